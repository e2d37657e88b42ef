"""What a machine's process may still do: compute, and use the descriptors that it has.

`Sandbox` is prepared once, by the zygote, which may; each child then enters it, by `seclude` and `confine`. What of it
holds on this host, `layers` says; `vmfs doctor` and `stat` show it. The rules are tried from inside by
tests/host/test_sandbox.py.

Source: seccomp(2), namespaces(7), pivot_root(2), libseccomp's documentation.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import tempfile
from typing import Any

from vmfs.host.credentials import Credentials, drop_bounding_set, limit_capabilities, no_new_privileges

_LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000, 0x4000_0000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
_MS_REMOUNT, _MNT_DETACH = 32, 2
_SYS_PIVOT_ROOT = 155
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAP_AMBIENT = 1, 22, 47
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
_F_SETOWN_EX = 15  # Linux include/uapi/asm-generic/fcntl.h
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902  # include/uapi/asm-generic/sockios.h
OWN_MEMORY = 1 << 30  # bytes of a machine's process that no limit of a mount counts: heap, stacks, host code
DESCRIPTORS_MOST = 4096
_INSIDE = (("net", CLONE_NEWNET), ("ipc", CLONE_NEWIPC), ("uts", CLONE_NEWUTS), ("mnt", CLONE_NEWNS))

# System calls of a machine's process. No path, process, credential or socket is named by any of them, but for stat's of
# an open descriptor. What is not here fails with EPERM.
MACHINE_CALLS = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    fstat newfstatat statx fstatfs fcntl ftruncate fallocate fsync fdatasync sync_file_range flock copy_file_range
    dup dup2 dup3 pipe2 eventfd2 timerfd_create timerfd_settime timerfd_gettime memfd_create ioctl
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    recvfrom recvmsg sendto sendmsg accept4 shutdown getsockname getpeername getsockopt
    mmap munmap mremap mprotect madvise msync mincore brk membarrier
    futex set_robust_list rseq sched_yield sched_getaffinity getcpu
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending sigaltstack tgkill restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time
    getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getrusage times uname sysinfo
    getrandom getcwd arch_prctl exit exit_group
""".split()
_THREAD = 0x0001_0000  # CLONE_THREAD
_MULTIPLY = 0x0120_8000 | signal.SIGCHLD  # CLONE_PARENT, CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID: _multiply.c
_OWN_PID = 0x7FED_CBA9  # in a filter, in the place of the number of the process that loads it
_PRCTLS = (15, 16, 38, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_VMA

# What a process that is nobody's yet may do besides, to become somebody's (`confine`).
BIRTH_CALLS = "prlimit64 setgroups setresgid setresuid capget capset".split()
_BIRTH_PRCTLS = (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAP_AMBIENT)

# What one that multiplies (vmfs.host.template) may do besides, and its forks not.
_TEMPLATE_PRCTLS = (_PR_SET_PDEATHSIG, _PR_SET_SECCOMP)

# Of a process that serves a folder: files, and nothing else.
SHARE_CALLS = [
    *MACHINE_CALLS,
    *"""
    openat openat2 getdents64 readlinkat mkdirat mknodat symlinkat linkat unlinkat renameat renameat2
    fchmod fchmodat fchmodat2 fchown fchownat lchown chown chmod utimensat truncate statfs readlink stat lstat
    access faccessat faccessat2 umask rename unlink rmdir mkdir symlink link open chdir fchdir
    """.split(),
]


def _filter(
    calls: list[str], *, set_id: bool, prctls: tuple[int, ...] = _PRCTLS, multiplies: bool = False
) -> bytes:
    """The BPF program that allows `calls`, threads, and those options of prctl.

    Without `set_id` no file may be made set-user-ID by name of its mode, nor set-group-ID unless it is done by the
    folder's own inheritance. OSError where libseccomp is missing.
    """
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ERRNO(1))
    for call in calls:
        if call in ("fchmod", "fchmodat", "chmod", "fchmodat2") and not set_id:
            at = 2 if "at" in call else 1
            rules.add_rule(seccomp.ALLOW, call, seccomp.Arg(at, seccomp.MASKED_EQ, 0o4000, 0))
            continue
        try:
            rules.add_rule(seccomp.ALLOW, call)
        except (OSError, RuntimeError, ValueError):  # a call that this libseccomp does not know
            continue
    rules.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _THREAD, _THREAD))
    if multiplies:
        rules.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.EQ, _MULTIPLY))
    rules.add_rule(seccomp.ERRNO(38), "clone3")  # ENOSYS: glibc makes threads by clone then
    rules.add_rule(seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX))
    # Not SO_LINGER: with it, closing the socket may wait.
    rules.add_rule(seccomp.ALLOW, "setsockopt", seccomp.Arg(2, seccomp.NE, socket.SO_LINGER))
    for option in prctls:
        rules.add_rule(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.EQ, option))
    return _program(rules)


def _last_filter(but: tuple[int, ...] = ()) -> bytes:
    """Over that of a process that was nobody's: what a birth takes is over. It is short, since a user waits for it.
    `but`: options of prctl that are still needed."""
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for call in BIRTH_CALLS:
        rules.add_rule(seccomp.ERRNO(1), call)
    for option in set(_BIRTH_PRCTLS) - set(but):
        rules.add_rule(seccomp.ERRNO(1), "prctl", seccomp.Arg(0, seccomp.EQ, option))
    return _program(rules)


def _fork_filter() -> bytes:
    """Over that of a template, of a fork that it has made: it makes none, and sends no signal to others, with which it
    shares a namespace."""
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.add_rule(seccomp.ERRNO(1), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _THREAD, 0))
    rules.add_rule(seccomp.ERRNO(1), "tgkill", seccomp.Arg(0, seccomp.NE, _OWN_PID))
    for option in _TEMPLATE_PRCTLS:
        rules.add_rule(seccomp.ERRNO(1), "prctl", seccomp.Arg(0, seccomp.EQ, option))
    for command in (fcntl.F_SETOWN, _F_SETOWN_EX):
        rules.add_rule(seccomp.ERRNO(1), "fcntl", seccomp.Arg(1, seccomp.EQ, command))
    for request in (_FIOSETOWN, _SIOCSPGRP):
        rules.add_rule(seccomp.ERRNO(1), "ioctl", seccomp.Arg(1, seccomp.EQ, request))
    program = _program(rules)
    if program.count(_OWN_PID.to_bytes(4, "little")) != 1:
        raise RuntimeError("the filter of a fork has no place for its own number")
    return program


def _program(rules: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


class Sandbox:
    """Prepared in a process of one thread. `layers`: what holds of it here, by name, each with the reason where it
    does not."""

    def __init__(self) -> None:
        self.layers: dict[str, str] = {}
        self._filters: dict[str, bytes] = {}
        self._inside: dict[str, int] = {}  # namespaces that all machines share: empty ones
        try:
            self._filters = {
                "nobody": _filter([*MACHINE_CALLS, *BIRTH_CALLS], set_id=True, prctls=_PRCTLS + _BIRTH_PRCTLS),
                "machine": _last_filter(),
                "multiplies": _filter(
                    [*MACHINE_CALLS, *BIRTH_CALLS], set_id=True, prctls=_PRCTLS + _BIRTH_PRCTLS, multiplies=True
                ),
                "template": _last_filter(but=_TEMPLATE_PRCTLS),
                "fork": _fork_filter(),
                "share": _filter(SHARE_CALLS, set_id=False),
                "helper": _filter([*MACHINE_CALLS, "prlimit64", "alarm", "setitimer"], set_id=False),
            }
            self.layers["seccomp"] = ""
        except (ImportError, OSError, RuntimeError) as error:
            self.layers["seccomp"] = f"libseccomp: {error}"
        self.layers["no_new_privs"] = ""
        self.layers["limits"] = ""
        self.layers["user"] = "" if os.geteuid() == 0 else "the server is no root: machines are its own user's"
        try:
            self._inside = _empty_namespaces()
            self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            self.layers["namespaces"] = ""
        except OSError as error:
            self.layers["namespaces"] = os.strerror(error.errno or 1)
        self.keeper = 0  # the process that keeps the namespace in which templates, and the forks that they make, are
        if self._inside:
            self._template_pids = self._keep_pids()

    # ---- in the zygote, around a fork

    def fork(self) -> int:
        """os.fork, with the child in a process namespace of its own where that can be."""
        if not self._inside:
            return os.fork()
        if _LIBC.unshare(CLONE_NEWPID):
            return os.fork()
        try:
            return os.fork()
        finally:
            _LIBC.setns(self._own_pids, CLONE_NEWPID)

    def fork_template(self) -> int:
        """os.fork, with the child where templates and their forks are. It is not the first of that namespace, which
        could not make children of its parent's (clone(2))."""
        if not self._inside:
            return os.fork()
        if _LIBC.setns(self._template_pids, CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), "setns pid")
        try:
            return os.fork()
        finally:
            _LIBC.setns(self._own_pids, CLONE_NEWPID)

    def _keep_pids(self) -> int:
        """A process namespace, which is there as long as its first process, and that does nothing."""
        self.keeper = self.fork()
        if self.keeper == 0:
            try:
                signal.set_wakeup_fd(-1)
                os.closerange(0, min(self._inside.values()))
                self.seclude()
                os.closerange(0, DESCRIPTORS_MOST)
                while True:
                    select.select([], [], [])
            finally:
                os._exit(1)
        return os.open(f"/proc/{self.keeper}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    # ---- in the child

    def seclude(self, *, multiplies: bool = False) -> None:
        """See nothing of the host but the open descriptors, and do nothing that a machine or its birth does not need.
        OSError where the host does not let that be. `multiplies`: it may fork."""
        for name, kind in _INSIDE:
            if name in self._inside and _LIBC.setns(self._inside[name], kind):
                raise OSError(ctypes.get_errno(), f"setns {name}")
        if os.geteuid() == 0:
            drop_bounding_set()
        no_new_privileges()
        bound(resource.RLIMIT_CORE, 0)  # it would have the guest's memory, and the server's before it
        bound(resource.RLIMIT_NOFILE, DESCRIPTORS_MOST)
        die_with_parent()
        self.filter("multiplies" if multiplies else "nobody")

    def rehearse(self) -> None:
        """Be who it is, so that `confine` finds what it touches touched."""
        own = Credentials(os.geteuid(), os.getegid(), tuple(os.getgroups()))
        self.become(own, own.capabilities)
        die_with_parent()

    def confine(self, who: Credentials, memory_most: int = 0, *, multiplies: bool = False) -> None:
        """After `seclude`: be `who`, for good. OSError where the host does not let that be.

        `memory_most` (0: any): what it keeps beside RAM may not be more than that and `OWN_MEMORY`. `multiplies`: each
        of its forks goes on with `confine_fork`.
        """
        if memory_most:
            bound(resource.RLIMIT_DATA, memory_most + OWN_MEMORY)
        self.become(who)
        die_with_parent()  # between the two: the filter forbids it
        self.filter("template" if multiplies else "machine")

    def confine_fork(self) -> None:
        """In a fork that a template has made: it is its user already."""
        die_with_parent()
        if "fork" in self._filters:
            own = os.getpid().to_bytes(4, "little")
            set_filter(self._filters["fork"].replace(_OWN_PID.to_bytes(4, "little"), own))

    def become(self, who: Credentials, capabilities: int = 0) -> None:
        """The user, and none but those capabilities. A server that is no root has machines of its own user."""
        who.limit_file_size()
        if os.geteuid() == 0:
            os.setgroups(who.groups)
            os.setresgid(who.gid, who.gid, who.gid)
            if who.uid:
                os.setresuid(who.uid, who.uid, who.uid)
        limit_capabilities(capabilities)

    def filter(self, name: str) -> None:
        if name in self._filters:
            set_filter(self._filters[name])


def bound(limit: int, most: int) -> None:
    """Have no more of it than `most`, for good."""
    _, hard = resource.getrlimit(limit)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))


def die_with_parent() -> None:
    """SIGKILL when the parent ends. After all changes of credentials, which take it back (prctl(2))."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")


def set_filter(program: bytes) -> None:
    """A seccomp filter, struct sock_filter after struct sock_filter, for this thread and all that it makes."""
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(head), 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _empty_namespaces() -> dict[str, int]:
    """Descriptors of namespaces without interfaces, without files, made by a short-lived child."""
    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ours.close()
            socket.send_fds(its, [b"ok"], _make_empty())
            code = 0
        except OSError as error:
            its.send(struct.pack("<i", error.errno or 1))
        finally:
            os._exit(code)
    its.close()
    with ours:
        said, fds, _, _ = socket.recv_fds(ours, 16, len(_INSIDE))
    os.waitpid(child, 0)
    if said != b"ok":
        for fd in fds:
            os.close(fd)
        raise OSError(struct.unpack("<i", said)[0] if len(said) == 4 else 1, "namespaces")
    return dict(zip((name for name, _ in _INSIDE), fds, strict=True))


def _make_empty() -> list[int]:
    """Go into new namespaces whose only file is an empty root; descriptors of them, in the order of _INSIDE."""

    def check(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), what)

    check(_LIBC.unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS), "unshare")
    check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount /")
    fds = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name, _ in _INSIDE]  # before /proc is gone
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    check(_LIBC.mount(b"none", b"/tmp", b"tmpfs", flags, b"size=4k,nr_inodes=2,mode=0555"), "mount tmpfs")
    os.chdir("/tmp")
    check(_LIBC.syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")  # the old root lies on the new one then
    check(_LIBC.umount2(b".", _MNT_DETACH), "umount")
    check(_LIBC.mount(b"none", b"/", None, _MS_REMOUNT | flags | _MS_RDONLY, None), "remount")
    return fds
