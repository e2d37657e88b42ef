"""A machine's process is hostile: what it may not do is tried from inside its sandbox, a system call at a time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from host.openers import sandbox
from host.users import B, Child, pid_of, status

from vmfs.host.credentials import Credentials
from vmfs.host.sandbox import Sandbox

LIBC = ctypes.CDLL(None, use_errno=True)
WHO = Credentials(B.uid, B.uid)
PATH = ctypes.c_char_p(b"/etc/passwd")
HERE = -100  # AT_FDCWD
ROOM = ctypes.create_string_buffer(4096)
INET, UNIX, STREAM = socket.AF_INET, socket.AF_UNIX, socket.SOCK_STREAM
SIGCHLD = int(signal.SIGCHLD)
NEW_USER = 0x1000_0000
NOBODYS = 1 << 22  # a process id that there is none of

# Linux arch/x86/entry/syscalls/syscall_64.tbl: name, number, arguments.
FORBIDDEN: list[tuple[str, int, tuple[object, ...]]] = [
    ("open", 2, (PATH, 0)),
    ("openat", 257, (HERE, PATH, 0)),
    ("openat2", 437, (HERE, PATH, ROOM, 24)),
    ("open_by_handle_at", 304, (HERE, ROOM, 0)),
    ("name_to_handle_at", 303, (HERE, PATH, ROOM, ROOM, 0)),
    ("creat", 85, (PATH, 0o600)),
    ("stat", 4, (PATH, ROOM)),
    ("access", 21, (PATH, 0)),
    ("readlink", 89, (PATH, ROOM, 100)),
    ("truncate", 76, (PATH, 0)),
    ("unlink", 87, (PATH,)),
    ("rename", 82, (PATH, PATH)),
    ("link", 86, (PATH, PATH)),
    ("symlink", 88, (PATH, PATH)),
    ("mkdir", 83, (PATH, 0)),
    ("mknod", 133, (PATH, 0o10600, 0)),
    ("chmod", 90, (PATH, 0o4755)),
    ("fchmod", 91, (0, 0o4755)),
    ("chown", 92, (PATH, 0, 0)),
    ("fchown", 93, (0, 0, 0)),
    ("utimensat", 280, (HERE, PATH, None, 0)),
    ("getdents64", 217, (0, ROOM, 100)),
    ("chdir", 80, (PATH,)),
    ("chroot", 161, (PATH,)),
    ("pivot_root", 155, (PATH, PATH)),
    ("mount", 165, (PATH, PATH, PATH, 0, None)),
    ("umount2", 166, (PATH, 0)),
    ("fsopen", 430, (PATH, 0)),
    ("open_tree", 428, (HERE, PATH, 0)),
    ("move_mount", 429, (HERE, PATH, HERE, PATH, 0)),
    ("setxattr", 188, (PATH, PATH, ROOM, 1, 0)),
    ("socket-inet", 41, (INET, STREAM, 0)),
    ("socket-unix", 41, (UNIX, STREAM, 0)),
    ("socket-netlink", 41, (socket.AF_NETLINK, socket.SOCK_RAW, 0)),
    ("socket-vsock", 41, (socket.AF_VSOCK, STREAM, 0)),
    ("socketpair-inet", 53, (INET, STREAM, 0, ROOM)),
    ("connect", 42, (0, ROOM, 16)),
    ("bind", 49, (0, ROOM, 16)),
    ("listen", 50, (0, 1)),
    ("linger", 54, (0, socket.SOL_SOCKET, socket.SO_LINGER, ROOM, 8)),
    ("execve", 59, (PATH, None, None)),
    ("execveat", 322, (HERE, PATH, None, None, 0)),
    ("fork", 57, ()),
    ("vfork", 58, ()),
    ("clone", 56, (SIGCHLD, 0, 0, 0, 0)),
    ("clone-user-namespace", 56, (SIGCHLD | NEW_USER, 0, 0, 0, 0)),
    ("unshare", 272, (NEW_USER,)),
    ("setns", 308, (0, 0)),
    ("ptrace", 101, (0, 0, 0, 0)),
    ("process_vm_readv", 310, (NOBODYS, ROOM, 1, ROOM, 1, 0)),
    ("process_vm_writev", 311, (NOBODYS, ROOM, 1, ROOM, 1, 0)),
    ("kill", 62, (NOBODYS, 0)),
    ("tkill", 200, (NOBODYS, 0)),
    ("rt_sigqueueinfo", 129, (NOBODYS, 0, ROOM)),
    ("pidfd_open", 434, (1, 0)),
    ("pidfd_getfd", 438, (0, 0, 0)),
    ("pidfd_send_signal", 424, (0, 0, None, 0)),
    ("kcmp", 312, (1, 1, 0, 0, 0)),
    ("prlimit64", 302, (0, 7, None, ROOM)),
    ("setrlimit", 160, (7, ROOM)),
    ("setpriority", 141, (0, 0, 0)),
    ("sched_setscheduler", 144, (0, 1, ROOM)),
    ("setuid", 105, (0,)),
    ("setgid", 106, (0,)),
    ("setresuid", 117, (0, 0, 0)),
    ("setresgid", 119, (0, 0, 0)),
    ("setgroups", 116, (0, None)),
    ("capset", 126, (ROOM, ROOM)),
    ("setsid", 112, ()),
    ("keyctl", 250, (0, 0, 0, 0, 0)),
    ("add_key", 248, (PATH, PATH, ROOM, 1, 0)),
    ("request_key", 249, (PATH, PATH, None, 0)),
    ("bpf", 321, (0, ROOM, 16)),
    ("perf_event_open", 298, (ROOM, 0, -1, -1, 0)),
    ("io_uring_setup", 425, (1, ROOM)),
    ("io_setup", 206, (1, ROOM)),
    ("userfaultfd", 323, (0,)),
    ("seccomp", 317, (1, 0, ROOM)),
    ("personality", 135, (0xFFFF_FFFF,)),
    ("modify_ldt", 154, (0, ROOM, 16)),
    ("iopl", 172, (3,)),
    ("ioperm", 173, (0, 1, 1)),
    ("shmget", 29, (0, 4096, 0o1600)),
    ("msgget", 68, (0, 0o1600)),
    ("semget", 64, (0, 1, 0o1600)),
    ("mq_open", 240, (PATH, 0, 0, None)),
    ("inotify_init1", 294, (0,)),
    ("fanotify_init", 300, (0, 0)),
    ("vmsplice", 278, (0, ROOM, 1, 0)),
    ("memfd_secret", 447, (0,)),
    ("landlock_create_ruleset", 444, (ROOM, 8, 0)),
    ("init_module", 175, (ROOM, 1, PATH)),
    ("kexec_load", 246, (0, 0, ROOM, 0)),
    ("reboot", 169, (0, 0, 0, None)),
    ("swapon", 167, (PATH, 0)),
    ("quotactl", 179, (0, PATH, 0, ROOM)),
    ("settimeofday", 164, (None, None)),
    ("clock_settime", 227, (0, ROOM)),
    ("adjtimex", 159, (ROOM,)),
    ("sethostname", 170, (PATH, 1)),
    ("syslog", 103, (10, None, 0)),
    ("acct", 163, (None,)),
    ("prctl-dumpable", 157, (4, 1, 0, 0, 0)),
    ("prctl-pdeathsig", 157, (1, 0, 0, 0, 0)),
]
ANSWERS = {"clone3": errno.ENOSYS}


def enter(box: Sandbox) -> None:
    box.seclude()
    box.confine(WHO)


def inside(act: Callable[[], object], enter: Callable[[Sandbox], None] = enter) -> object:
    """What `act` returns in the sandbox of a machine's process."""
    box = sandbox()
    if box.layers["seccomp"]:
        pytest.skip(f"seccomp: {box.layers['seccomp']}")
    return Child(0, act, lambda: enter(box)).result()


def call(number: int, arguments: tuple[object, ...]) -> int:
    """The errno of a system call, 0 where it is done. In 64 bits: an int alone would be pushed in 32."""
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    ctypes.set_errno(0)
    LIBC.syscall.restype = ctypes.c_long
    returned = LIBC.syscall(ctypes.c_long(number), *words)
    if returned == 0 and number in (56, 57, 58):
        os._exit(9)  # a child: it should not be
    return ctypes.get_errno() if returned < 0 else 0


def all_calls() -> dict[str, int]:
    """What all come to in one process."""
    return {name: call(number, arguments) for name, number, arguments in FORBIDDEN}


@pytest.fixture(scope="module")
def answers() -> dict[str, int]:
    return inside(all_calls)  # type: ignore


@pytest.fixture(scope="module")
def nobodys() -> dict[str, int]:
    """In a process that waits for its user."""
    return inside(all_calls, Sandbox.seclude)  # type: ignore


@pytest.mark.parametrize("name", [row[0] for row in FORBIDDEN])
def test_it_is_refused(answers, name):
    assert errno.errorcode.get(answers[name], "done") == "EPERM"


# The errnos of what a process does to become its user's.
OF_A_BIRTH = {**dict.fromkeys(("setgroups", "setresuid", "setresgid", "prctl-pdeathsig", "prlimit64"), 0), "capset": 22}


@pytest.mark.parametrize("name", [row[0] for row in FORBIDDEN])
def test_it_is_refused_to_a_process_that_is_nobodys(nobodys, name):
    assert nobodys[name] == OF_A_BIRTH.get(name, errno.EPERM)


def test_an_option_of_prctl_that_is_another_in_64_bits_is_refused():
    """The kernel looks at 32 of them, a filter at all."""
    asked = [(high << 32 | option) for high in (1, 1 << 31) for option in (1, 4, 15, 22, 38, 47)]
    found = inside(lambda: [call(157, (option, 1, 0, 0, 0)) for option in asked])
    assert found == [errno.EPERM] * len(asked)


def test_clone3_is_said_not_to_exist():
    """So that glibc makes threads by clone, whose flags a filter can look at."""
    assert inside(lambda: call(435, (ROOM, 88))) == errno.ENOSYS


def test_threads_are_made():
    def act() -> int:
        import threading

        done: list[int] = []
        thread = threading.Thread(target=lambda: done.append(1))
        thread.start()
        thread.join()
        return len(done)

    assert inside(act) == 1


def test_other_ways_to_make_system_calls_are_none():
    """By 32-bit numbers, `int 0x80`, the filter would be another."""

    def act() -> int:
        pid = os.getpid()
        code = bytes.fromhex("b814000000 cd80 c3")  # mov eax, 20 (getpid of i386); int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return ctypes.CFUNCTYPE(ctypes.c_int)(address)() - pid

    box = sandbox()
    if box.layers["seccomp"]:
        pytest.skip(box.layers["seccomp"])
    child = Child(0, act, lambda: enter(box))
    try:
        assert child.result() != 0
    except AssertionError as error:
        assert "it was killed" in str(error)


# ---- the process of a real machine


@pytest.fixture(scope="module")
def process(server) -> dict[str, str]:
    vm = B.makes(server.path / "sandboxed")
    pid = pid_of(vm)
    facts = {**status(pid), "process": str(pid)}
    for name in ("net", "ipc", "uts", "mnt", "pid", "user"):
        facts[name] = os.readlink(f"/proc/{pid}/ns/{name}")
    facts["root"] = " ".join(os.listdir(f"/proc/{pid}/root/"))
    facts["fds"] = " ".join(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    facts["stat"] = vm.read("stat")
    yield facts
    vm.path.rmdir()


def test_it_is_its_maker_without_capabilities(process):
    assert process["Uid"].split() == [str(B.uid)] * 4 and process["Gid"].split() == [str(B.uid)] * 4
    assert process["Groups"].split() == []
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(process[kind], 16) == 0, kind
    assert process["NoNewPrivs"] == "1" and process["Seccomp"] == "2"


def test_it_leaves_no_core(process):
    limits = Path(f"/proc/{process['process']}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]


def test_it_sees_nothing(process):
    if sandbox().layers["namespaces"]:
        pytest.skip(sandbox().layers["namespaces"])
    for name in ("net", "ipc", "uts", "mnt", "pid"):
        assert process[name] != os.readlink(f"/proc/self/ns/{name}")
    assert process["root"] == ""


def test_it_has_no_descriptor_of_the_servers(process):
    for path in process["fds"].split():
        assert not path.startswith("/dev/fuse") and ".log" not in path.replace("m.log", ""), path


def test_all_threads_have_the_filter(server):
    vm = B.makes(server.path / "running")
    B.does(vm.load, "40 ebfd")
    B.does(vm.write, "state", "run")
    tasks = list(Path(f"/proc/{pid_of(vm)}/task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        assert (lines["Seccomp"], lines["NoNewPrivs"], int(lines["CapPrm"], 16)) == ("2", "1", 0)
    vm.path.rmdir()


def test_stat_and_doctor_say_what_holds(process):
    layers = {name for name, why in sandbox().layers.items() if not why}
    line = next(line for line in process["stat"].splitlines() if line.startswith("sandbox "))
    assert set(line.split(" ", 1)[1].split(",")) == layers
    from vmfs.commands import doctor

    found = {each.name: each for each in doctor.sandbox()}
    assert set(found) == {f"sandbox {name}" for name in sandbox().layers}
    for name, why in sandbox().layers.items():
        one = found[f"sandbox {name}"]
        assert one.status == (doctor.WARN if why else doctor.OK)
        assert not why or why in one.meaning


def test_a_layer_that_is_missing_is_told(monkeypatch):
    from vmfs.commands import doctor
    from vmfs.host import sandbox as module

    def refuse() -> dict[str, int]:
        raise OSError(errno.EPERM, "unshare")

    monkeypatch.setattr(module, "_empty_namespaces", refuse)
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    found = {each.name: each for each in doctor.sandbox()}
    assert found["sandbox seccomp"].status == found["sandbox namespaces"].status == doctor.WARN
    assert "Operation not permitted" in found["sandbox namespaces"].meaning
