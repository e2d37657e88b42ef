"""vmfs mount, umount and doctor as processes, on real mounts, and mount(8) itself."""

import contextlib
import errno
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounting import for_plain_processes, has_news, reason_against_mounts

from vmfs import cli
from vmfs.commands import terminal
from vmfs.host import mounts

ROOT = Path(__file__).resolve().parents[2]
VMFS = Path(sys.executable).parent / "vmfs"
COMMAND = [sys.executable, "-m", "vmfs.cli"]

pytestmark = pytest.mark.skipif(bool(reason_against_mounts()), reason=str(reason_against_mounts()))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mount namespaces and mount(8)")


def vmfs(*argv, **options):
    """The command, with its output captured: it ends when no process holds its stdout or stderr any more."""
    return subprocess.run([*COMMAND, *map(str, argv)], capture_output=True, text=True, cwd=ROOT, **options)


def in_foreground(directory):
    command = [*COMMAND, "mount", "-f", directory]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def unshared(script: str, *argv):
    """`script` run by sh with a mount namespace of its own; `$@` is the vmfs command and `argv`."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if tried.returncode:        # in a chroot or a container, maybe
        pytest.skip(f"no mount namespace: {tried.stderr.strip()}")
    command = [*unshare, "sh", "-c", script, "sh", *COMMAND, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def is_mounted(directory):
    found = mounts.at(directory)
    return found is not None and found.is_vmfs


def wait_for_mount(directory, wanted=True, seconds=30):
    """Until `directory` is (or is no longer) a vmfs mount: the kernel tells of each change of the table."""
    with open("/proc/self/mountinfo") as changes:
        poll = select.poll()
        poll.register(changes, select.POLLERR | select.POLLPRI)
        while is_mounted(directory) != wanted:
            assert poll.poll(seconds * 1000), f"not {'mounted' if wanted else 'unmounted'} within {seconds} s"


def processes_of(directory):
    """pid -> program name, of the processes whose arguments name the directory."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (each / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(directory) in argv and int(each.name) != os.getpid():
                found[int(each.name)] = (each / "comm").read_text().strip()
    return found


def server_of(directory):
    # `sh` is the watcher, and the server's children say what they are.
    (pid,) = [pid for pid, name in processes_of(directory).items() if name != "sh" and not name.startswith("vmfs-")]
    return pid


@contextlib.contextmanager
def ends(pid, seconds=30):
    """Within the block, something ends process `pid`; after it, it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        assert has_news(pidfd, seconds=seconds), f"process {pid} runs on after {seconds} s"
    finally:
        os.close(pidfd)


@pytest.fixture
def directory(tmp_path):
    """An empty directory, and nothing mounted on it in the end."""
    path = tmp_path / "m"
    path.mkdir()
    yield path
    while is_mounted(path):
        mounts.unmount(path, lazy=True)
    for pid in processes_of(path):      # whatever a failed test left
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mounted(directory):
    done = vmfs("mount", directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


# --- mounting and unmounting -----------------------------------------------------------------------------


def test_a_mount_is_ready_when_the_command_returns(mounted):
    assert sorted(os.listdir(mounted)) == ["engines", "error", "machines", "version"]
    machine = mounted / "first"
    machine.mkdir()
    assert (machine / "mem").stat().st_size == 128 << 20
    machine.rmdir()
    assert sorted(os.listdir(mounted)) == ["engines", "error", "machines", "version"]


def test_the_mount_table_shows_it(mounted):
    found = mounts.at(mounted)
    assert (found.kind, found.source, found.user) == ("fuse.vmfs", "vmfs", os.geteuid())


def test_umount_ends_the_server_and_its_machines(mounted):
    (mounted / "left").mkdir()
    with ends(server_of(mounted)):
        done = vmfs("umount", mounted)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(mounted) == []
    wait_for_mount(mounted, False)


@pytest.mark.parametrize("command", [["fusermount3", "-u"], ["umount"]], ids=lambda command: command[0])
def test_other_ways_to_unmount(command, mounted):
    if command[0] == "umount" and os.geteuid():
        pytest.skip("umount(8) is for root")
    with ends(server_of(mounted)):
        subprocess.run([*command, mounted], check=True)
    assert not is_mounted(mounted)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_without_standard_streams(closed, directory):
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, "mount", directory], cwd=ROOT)
    assert done.returncode == 0
    assert sorted(os.listdir(directory)) == ["engines", "error", "machines", "version"]
    (directory / "a").mkdir()
    server = server_of(directory)
    links = {os.readlink(f"/proc/{server}/fd/{number}") for number in range(3)}
    assert links == {os.devnull}


def test_mounting_twice_is_refused_and_changes_nothing(mounted):
    (mounted / "kept").mkdir()
    done = vmfs("mount", mounted)
    assert (done.returncode, done.stderr) == (1, f"vmfs mount: {mounted} is a vmfs mount already\n")
    assert (mounted / "kept").is_dir()
    assert len([each for each in mounts.table() if each.path == str(mounted)]) == 1


def test_a_mount_in_use_is_unmounted_only_lazily(mounted):
    pid = server_of(mounted)
    inside = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = vmfs("umount", mounted)
        assert done.returncode == 1
        assert done.stderr.startswith(f"vmfs umount: {mounted} is in use")
        assert is_mounted(mounted)
        assert vmfs("umount", "--lazy", mounted).returncode == 0
        assert not is_mounted(mounted)
        with ends(pid):
            os.close(inside)
            inside = None
    finally:
        if inside is not None:
            os.close(inside)


def test_the_directory_can_be_named_relatively_and_by_a_link(directory):
    (directory.parent / "link").symlink_to(directory.name)
    done = subprocess.run([*COMMAND, "mount", "link"], cwd=directory.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_mounted(directory)
    done = subprocess.run([*COMMAND, "umount", "link"], cwd=directory.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(directory)


def test_a_path_with_blanks_commas_and_more(tmp_path):
    path = tmp_path / "a b,c=d\\ é\n#"
    path.mkdir()
    try:
        assert vmfs("mount", path).returncode == 0
        assert (path / "version").is_file()
        assert vmfs("umount", path).returncode == 0
        assert not is_mounted(path)
    finally:
        if is_mounted(path):
            mounts.unmount(path, lazy=True)


def test_mount_vmfs_py_is_the_same(directory):
    command = [sys.executable, ROOT / "mount_vmfs.py", directory]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (directory / "version").is_file()


def test_the_installed_command(directory):
    if not VMFS.exists():
        pytest.skip(f"{VMFS} is not installed: make setup")
    assert subprocess.run([VMFS, "mount", directory]).returncode == 0
    assert (directory / "version").is_file()
    assert subprocess.run([VMFS, "umount", directory]).returncode == 0


# --- options ---------------------------------------------------------------------------------------------


@for_plain_processes
def test_limits_are_kept(directory):
    assert vmfs("mount", directory, "--max-vms", 2, "-o", "max_mem=192M").returncode == 0
    (directory / "a").mkdir()
    with pytest.raises(OSError) as over:
        (directory / "b").mkdir()       # 128 MiB more
    assert over.value.errno == errno.ENOSPC
    (directory / "a/mem_size").write_text("16M\n")
    os.truncate(directory / "a/mem", 32 << 20)
    (directory / "b").mkdir()
    with pytest.raises(OSError) as over:
        (directory / "c").mkdir()
    assert over.value.errno == errno.ENOSPC
    (directory / "b").rmdir()
    (directory / "b").mkdir()


def test_read_only(directory):
    assert vmfs("mount", directory, "-o", "ro").returncode == 0
    with pytest.raises(OSError) as refused:
        (directory / "a").mkdir()
    assert refused.value.errno == errno.EROFS


@pytest.mark.parametrize("engine", ["emulator", "kvm"])
def test_a_forced_engine_is_the_engine_of_new_machines(engine, directory):
    done = vmfs("mount", directory, "--engine", engine)
    if done.returncode:
        assert engine in done.stderr
        pytest.skip(done.stderr.strip())
    (directory / "a").mkdir()
    assert (directory / "a/engine").read_text() == f"{engine}\n"


@needs_root
def test_a_forced_engine_that_is_not_there_fails_and_leaves_nothing(directory):
    script = 'mount --bind /dev/null /dev/kvm && "$@"'
    if not os.path.exists("/dev/kvm"):
        script = '"$@"'
    done = unshared(script, "mount", directory, "--engine", "kvm")
    assert done.returncode == 1
    assert done.stderr.startswith("vmfs mount: ") and "kvm" in done.stderr and done.stderr.count("\n") == 1
    assert not is_mounted(directory)
    assert processes_of(directory) == {}


@needs_root
def test_without_dev_fuse(directory):
    done = unshared('mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && "$@"', "mount", directory)
    assert done.returncode == 1
    assert done.stderr.startswith("vmfs mount: /dev/fuse does not exist") and done.stderr.count("\n") == 1


@needs_root
def test_a_dev_fuse_that_is_something_else(directory):
    done = unshared('mount --bind /dev/null /dev/fuse && "$@"', "mount", directory)
    assert done.returncode == 1
    assert done.stderr.startswith("vmfs mount: ") and done.stderr.count("\n") == 1
    assert not is_mounted(directory)
    assert processes_of(directory) == {}


def test_the_log(directory, tmp_path):
    log = tmp_path / "log"
    assert vmfs("mount", directory, "--log", log, "--debug").returncode == 0
    with ends(server_of(directory)):
        assert vmfs("umount", directory).returncode == 0
    assert "vmfs" in log.read_text()


# --- ends of a server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGINT SIGTERM", "SIGTERM SIGINT SIGINT"])
def test_in_the_foreground_a_signal_unmounts(how, directory):
    with in_foreground(directory) as server:
        wait_for_mount(directory)
        (directory / "a").mkdir()
        for name in how.split():
            server.send_signal(signal.Signals[name])
        _, err = server.communicate(timeout=30)
    assert (server.returncode, err) == (0, "")
    wait_for_mount(directory, False)


def test_in_the_foreground_umount_ends_it(directory):
    with in_foreground(directory) as server:
        wait_for_mount(directory)
        assert (directory / "version").read_text()
        assert vmfs("umount", directory).returncode == 0
        _, err = server.communicate(timeout=30)
    assert (server.returncode, err) == (0, "")


def test_a_signal_to_the_daemon_unmounts(mounted):
    (mounted / "a").mkdir()
    pid = server_of(mounted)
    with ends(pid):
        os.kill(pid, signal.SIGTERM)
    wait_for_mount(mounted, False)
    assert os.listdir(mounted) == []


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_killed_server_leaves_nothing_behind(mounted, looked_at):
    """Also where the kernel has the attributes of its root, and answers a stat of it without a server."""
    (mounted / "a").mkdir()
    if looked_at:
        mounted.stat()
    os.kill(server_of(mounted), signal.SIGKILL)
    wait_for_mount(mounted, False)
    assert os.listdir(mounted) == []
    assert vmfs("mount", mounted).returncode == 0


@pytest.fixture
def dead(mounted):
    """A mount whose server and its watcher are both killed, as by `kill -9 -1`; the kernel still has its attributes."""
    mounted.stat()
    server = server_of(mounted)
    processes = sorted(processes_of(mounted), key=lambda pid: pid == server)    # the server last
    for pid in processes:
        with ends(pid):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError) as gone:
        os.listdir(mounted)
    assert gone.value.errno == errno.ENOTCONN
    return mounted


def test_umount_takes_a_dead_mount_away(dead):
    done = vmfs("umount", dead)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(dead) == []


def test_mount_replaces_a_dead_mount(dead):
    done = vmfs("mount", dead)
    assert (done.returncode, done.stderr) == (0, "")
    assert (dead / "version").is_file()
    assert len([each for each in mounts.table() if each.path == str(dead)]) == 1


# --- mount(8) --------------------------------------------------------------------------------------------


@pytest.fixture
def helper(tmp_path):
    """A program for mount(8) to find: as a path, which mount.fuse3 takes as well as a name in PATH."""
    if shutil.which("mount.fuse3", path="/sbin:/usr/sbin") is None:
        pytest.skip("mount.fuse3 is not installed: apt-get install fuse3")
    program = tmp_path / "vmfs"
    preload = os.environ.get("LD_PRELOAD", "")      # `make asan` sets it and mount(8) takes it away
    program.write_text(f'#!/bin/sh\ncd {ROOT} && LD_PRELOAD="{preload}" exec {" ".join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    return program


@needs_root
@pytest.mark.parametrize("style", ["fuse.PROGRAM SOURCE", "fuse PROGRAM#", "fuse PROGRAM#SOURCE"])
def test_mount_8(style, helper, directory):
    kind, source = (part.replace("PROGRAM", str(helper)).replace("SOURCE", "lab") for part in style.split(" "))
    command = ["mount", "-t", kind, source, directory, "-o", "max_vms=1,noatime"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = mounts.at(directory)
    assert (found.kind, found.source) == ("fuse.vmfs", "lab" if "SOURCE" in style else "vmfs")
    (directory / "a").mkdir()
    with pytest.raises(OSError) as over:
        (directory / "b").mkdir()
    assert over.value.errno == errno.ENOSPC
    with ends(server_of(directory)):
        subprocess.run(["umount", directory], check=True)


@needs_root
def test_mount_8_fails_with_our_sentence(helper, directory):
    done = subprocess.run(["mount", "-t", f"fuse.{helper}", "none", directory, "-o", "max_vms=some"],
                          capture_output=True, text=True)
    assert done.returncode != 0
    assert "option 'max_vms': " in done.stderr
    assert not is_mounted(directory)


# --- boot and console ------------------------------------------------------------------------------------

DEBUG_EXIT = bytes.fromhex("B001E6F4").ljust(510, b"\0") + b"\x55\xaa"  # a boot sector: mov al, 1; out 0xf4, al
WITHOUT_MOUNTS = 'grep -o "[^ ]* fuse.vmfs" /proc/mounts | cut -d" " -f1 | xargs -r umount -l; exec "$@"'


@needs_root
def test_boot_where_nothing_is_mounted_has_a_mount_for_its_time(tmp_path, monkeypatch):
    (tmp_path / "sector").write_bytes(DEBUG_EXIT)
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    done = unshared(WITHOUT_MOUNTS, "boot", "--engine", "emulator", tmp_path / "sector")
    first, last = done.stderr.splitlines()
    assert first.startswith(f"vmfs boot: on {tmp_path}/t/vmfs-") and first.endswith(", a mount for this time")
    assert last.startswith("vmfs boot: shutdown cause=debug-exit code=3 ")
    assert done.returncode == 3
    assert os.listdir(tmp_path / "t") == []


def test_the_console_is_left_by_its_key_with_a_code_of_its_own(mounted):
    machine = mounted / "pc"
    machine.mkdir()
    (machine / "machine").write_text("pc\n")
    controller, terminal_fd = pty.openpty()
    command = [*COMMAND, "console", machine]
    process = subprocess.Popen(command, stdin=terminal_fd, stdout=terminal_fd, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        assert b"Ctrl-] leads out" in process.stderr.readline()
        deadline = time.monotonic() + 30
        while process.poll() is None:  # a key that comes before the terminal is raw is nobody's
            assert time.monotonic() < deadline, "it is not left by its key"
            os.write(controller, b"\x1d")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal_fd)
    assert process.returncode == terminal.ESCAPED not in (0, cli.FAILURE, cli.USAGE)
    assert (machine / "state").read_text() == "paused\n"


# --- doctor ----------------------------------------------------------------------------------------------


def test_doctor_mounts_for_a_trial_and_leaves_nothing(tmp_path):
    done = vmfs("doctor", "--json", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["works"] is True
    assert {each["name"]: each["status"] for each in report["findings"]}["trial mount"] == "ok"
    assert os.listdir(tmp_path) == []
    assert not [each for each in mounts.table() if each.path.startswith(str(tmp_path))]


@needs_root
def test_doctor_without_dev_fuse():
    done = unshared('mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && "$@"', "doctor")
    assert done.returncode == 1
    assert "missing  /dev/fuse" in done.stdout
    assert "trial mount" not in done.stdout
