"""Saved machines: a snapshot's directory copied out and in by plain programs, on a real mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mount.test_forks import ONCE, number, put
from mounting import Machine, failing, stat, wait_until

from vmfs.memory.layers import SEALS

SMALL = 4 << 20


def has_history(vm: Machine) -> bool:
    """Once no program has `mem` open any more: closes come a moment later."""
    with contextlib.suppress(OSError):
        vm.write("history", "on\n")
    return vm.read("history").startswith("on")


@pytest.fixture
def saved(vm, tmp_path) -> Path:
    """One that has run once, of 4 MiB."""
    vm.write("mem_size", f"{SMALL}\n")
    vm.load(ONCE)
    vm.run()
    put(vm, 0x234567, b"somewhere")
    (vm / "snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    return tmp_path / "saved"


def test_into_a_machine_of_the_same_parts(vm, server, tmp_path):
    """Which has had no snapshot, so that nobody knows what its RAM is."""
    vm.load(ONCE)
    vm.run()
    (vm / "snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    other = server.make()
    put(other, 0x5000, b"others")
    subprocess.run(["cp", "-r", tmp_path / "saved", other / "snap" / "in"], check=True)
    for _ in range(2):
        other.write("restore", "in\n")
        assert number(other) == 1 and other.run() == "hlt rip=0x1006\n" and number(other) == 2
    other.path.rmdir()


@contextlib.contextmanager
def memfds(folder: Path, *, is_sealed: bool = True):
    """The files of a saved machine, each as a memfd's path."""
    fds = {}
    try:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            name = str(path.relative_to(folder))
            fds[name] = fd = os.memfd_create(path.name, os.MFD_ALLOW_SEALING)
            with open(path, "rb") as source, open(fd, "wb", closefd=False) as file:
                shutil.copyfileobj(source, file)
            if is_sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        yield {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in fds.items()}
    finally:
        for fd in fds.values():
            os.close(fd)


def bring(other: Machine, paths: dict[str, str]) -> Path:
    """Into `snap/in` of a machine."""
    folder = other / "snap" / "in"
    before = os.umask(0)
    folder.mkdir(0o700)
    os.umask(before)
    for name, path in paths.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        os.setxattr(folder / name, "user.vmfs.memfd", path.encode())
    return folder


def pages_of(pid: int, inode: int) -> tuple[int, float]:
    """Bytes of a file that a process has in memory, and its part of them where others have them, too."""
    rss = pss = 0
    is_it = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_it = len(words) > 4 and words[4] == str(inode)
        elif is_it and words[0] in ("Rss:", "Pss:"):
            rss += (int(words[1]) << 10) * (words[0] == "Rss:")
            pss += (int(words[1]) << 10) * (words[0] == "Pss:")
    return rss, pss


def test_mounts_share_what_comes_in_as_a_memfd(vm, saved, own_server):
    """Each page once for both, as the kernel counts it, and what one writes is its alone."""
    put(vm, 0x300000, os.urandom(1 << 20))
    (vm / "snap" / "two").mkdir()
    subprocess.run(["cp", "-r", vm / "snap" / "two", saved.parent / "two"], check=True)
    engine = vm.read("engine").split()[0]
    with memfds(saved.parent / "two") as paths:
        inode = os.stat(paths["mem"]).st_ino
        others = [own_server(engine=engine).make() for _ in range(2)]
        for other in others:
            bring(other, paths)
            other.write("restore", "in\n")
            assert number(other) == 1 and other.run() == "hlt rip=0x1006\n" and number(other) == 2
            other.write("fork", "child from in\n")
            child = Machine(other.path.parent / "child")
            assert number(child) == 1 and (child / "mem").read_bytes() == (saved.parent / "two/mem").read_bytes()
        pids = [int(found) for found in os.listdir("/proc") if found.isdecimal() and int(found) != os.getpid()]
        found = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                rss, pss = pages_of(pid, inode)
                if rss:
                    found[pid] = rss, pss
        assert len(found) >= 2, "the processes of the machines have it mapped"
        together = sum(pss for _, pss in found.values())
        assert together < 1.1 * SMALL < sum(rss for rss, _ in found.values()), found
        for other in others:
            other.path.rmdir()


def test_what_is_no_sealed_memfd_is_no_file_of_a_machine(server, saved):
    other = server.make()
    with memfds(saved, is_sealed=False) as open_ones, memfds(saved) as paths:
        folder = bring(other, paths)
        for wrong in (open_ones["mem"], str(saved / "mem"), "relative", "/nowhere", "/", "", f"{other / 'mem'}"):
            assert failing(os.setxattr, folder / "mem", "user.vmfs.memfd", wrong.encode()) in (
                errno.EINVAL, errno.ENOENT, errno.EISDIR, errno.EACCES,
            ), wrong  # fmt: skip
            assert other.read("error").startswith("mem: ")
        for path, name in ((folder / "mem", "user.else"), (other / "regs", "user.vmfs.memfd")):
            assert failing(os.setxattr, path, name, b"x") == errno.EOPNOTSUPP
        for change in (lambda: (folder / "mem").write_bytes(b"x"), lambda: os.truncate(folder / "state", 1)):
            assert failing(change) == errno.EPERM
        (folder / "disks").mkdir(exist_ok=True)
        (folder / "disks/blk0").touch()
        assert failing(os.setxattr, folder / "disks/blk0", "user.vmfs.memfd", paths["mem"].encode()) == errno.EINVAL
        (folder / "disks/blk0").unlink()
        assert other.read("snap/in/info").splitlines()[-1].startswith("whole"), other.read("snap/in/info")
        other.write("restore", "in\n")
        assert number(other) == 1 and "mem" in os.listdir(folder)
        assert failing(os.setxattr, folder / "mem", "user.vmfs.memfd", paths["mem"].encode()) == errno.EACCES
    other.path.rmdir()


COPIERS = {
    "cp": ["cp", "-r", "{source}", "{target}"],
    "cp -a": ["cp", "-a", "{source}", "{target}"],
    "rsync": ["rsync", "-a", "{source}/", "{target}"],
    "rsync -I": ["rsync", "-aI", "{source}/", "{target}"],
    "rsync -S": ["rsync", "-rS", "{source}/", "{target}"],
    "tar -S": ["sh", "-c", 'tar -cSf - -C "{source}/.." saved | tar -xSf - -C "{folder}" --transform s/^saved/in/'],
    "tar": ["sh", "-c", 'tar -cf - -C "{source}/.." saved | tar -xf - -C "{folder}" --transform s/^saved/in/'],
    "python": ["python3", "-c", "import shutil; shutil.copytree('{source}', '{target}', dirs_exist_ok=True)"],
}


@pytest.mark.parametrize("copier", [name for name in COPIERS if name != "rsync -I"])
def test_in_by_plain_programs(vm, saved, server, copier):
    words = COPIERS[copier]
    if not shutil.which(words[0]):
        pytest.skip(f"there is no {words[0]}")
    other = server.make()
    target = f"{other / 'snap'}/in"
    subprocess.run([word.format(source=saved, target=target, folder=other / "snap") for word in words], check=True)
    assert other.read("snap/in/info").splitlines()[-1].startswith("whole"), other.read("snap/in/info")
    other.write("restore", "in\n")
    assert other.read("mem_size") == f"{SMALL}\n" and other.read("state") == "halted\n" and number(other) == 1
    assert number(other, 0x234567) == int.from_bytes(b"some", "little")
    assert other.run() == "hlt rip=0x1006\n" and number(other) == 2
    other.write("restore", "in\n")
    assert number(other) == 1 and "memory 4194304" in other.read("snap/in/info")
    assert (other / "mem").stat().st_size == SMALL
    other.path.rmdir()


@pytest.mark.parametrize("umask", [0o000, 0o077], ids="{:03o}".format)
def test_out_and_in_with_any_umask(vm, saved, server, tmp_path, umask):
    """What was asked for decides, and not what the umask leaves of it."""
    other, out = server.make(), tmp_path / "out" / "saved"
    out.parent.mkdir()
    for name in ("cp", "rsync -I", "tar"):
        if not shutil.which(COPIERS[name][0]):
            pytest.skip(f"there is no {COPIERS[name][0]}")
        subprocess.run(["cp", "-r", vm / "snap" / "one", out], check=True, umask=umask)
        words = [word.format(source=out, target=other / "snap/in", folder=other / "snap") for word in COPIERS[name]]
        subprocess.run(words, check=True, umask=umask)
        assert other.read("snap/in/info").splitlines()[-1].startswith("whole"), (name, other.read("snap/in/info"))
        other.write("restore", "in\n")
        assert number(other) == 1
        (other / "snap" / "in").rmdir()
        shutil.rmtree(out)
    for words in (["mkdir"], [sys.executable, "-c", "import os, sys; os.mkdir(sys.argv[1])"]):
        subprocess.run([*words, other / "snap" / "in"], check=True, umask=umask)
        assert other.read("snap/in/info").startswith("taken ")
        assert (other / "snap" / "in").stat().st_mode & 0o777 == 0o700 & ~umask
        (other / "snap" / "in").rmdir()
    other.path.rmdir()


def test_what_is_in_it_is_the_same_again(vm, saved, server, tmp_path):
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    other.write("restore", "in\n")
    subprocess.run(["cp", "-r", other / "snap" / "in", tmp_path / "again"], check=True)
    for name in ("mem", "state"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "again")) == ["disks", "images", "info", "mem", "state"]
    other.write("fork", "of-saved from in\n")
    child = Machine(server.path / "of-saved")
    assert number(child) == 1
    child.path.rmdir()
    other.path.rmdir()


def test_who_has_the_console_open_hears_the_machine_that_came_in(vm, server, tmp_path):
    """Of other parts, so that the machine is made anew."""
    vm.write("mem_size", f"{SMALL}\n")
    vm.write("machine", "pc\n")
    vm.load("baf803 b041 ee f4")  # mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt
    (vm / "snap" / "one").mkdir()
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    other = server.make()
    other.write("machine", "pc\n")
    console = os.open(other / "console", os.O_RDWR | os.O_NONBLOCK)
    try:
        subprocess.run(["cp", "-r", tmp_path / "saved", other / "snap" / "in"], check=True)
        other.write("restore", "in\n")
        assert "memory 4194304" in other.read("snap/in/info") and other.read("mem_size") == f"{SMALL}\n"
        other.write("vm_run", "insns 3\n")
        assert os.read(console, 100) == b"A"
        assert os.write(console, b"typed") == 5
    finally:
        os.close(console)
    other.path.rmdir()


def test_a_machine_of_the_same_parts_goes_on_with_what_it_has(vm, saved):
    pid = vm.read("stat").split("pid ")[1].split()[0]
    subprocess.run(["cp", "-r", saved, vm / "snap" / "in"], check=True)
    put(vm, 0x234567, b"elsewhere")
    vm.run()
    vm.write("restore", "in\n")
    assert number(vm) == 1 and number(vm, 0x234567) == int.from_bytes(b"some", "little")
    vm.write("restore", "one\n")
    assert number(vm) == 1 and vm.read("stat").split("pid ")[1].split()[0] == pid


def test_nobody_else_writes_into_a_snapshot(vm):
    (vm / "snap" / "mine").mkdir()  # this process may
    assert subprocess.run(["setsid", "sh", "-c", f"echo > {vm / 'snap/mine/mem'}"], stderr=-3).returncode
    assert "only read" in vm.read("error")
    assert subprocess.run(["setsid", "touch", f"{vm / 'snap/mine/file'}"], stderr=-3).returncode
    assert subprocess.run(["setsid", "rm", "-f", f"{vm / 'snap/mine/mem'}"], stderr=-3).returncode
    vm.write("restore", "mine\n")


def broken(folder: Path, path: str) -> None:
    """Change a file of a copy by an action of its name."""
    data = (folder / "state").read_bytes()
    {
        "no state": lambda: (folder / "state").unlink(),
        "no mem": lambda: (folder / "mem").unlink(),
        "short mem": lambda: os.truncate(folder / "mem", SMALL - 4096),
        "long mem": lambda: os.truncate(folder / "mem", SMALL + 4096),
        "short state": lambda: os.truncate(folder / "state", len(data) - 100),
        "empty state": lambda: os.truncate(folder / "state", 0),
        "other state": lambda: (folder / "state").write_bytes(b"\xc1" * 1000),
        "another format": lambda: (folder / "state").write_bytes(data.replace(b"\xa6format\x01", b"\xa6format\x02")),
        "more memory": lambda: (folder / "state").write_bytes(data.replace(b"\xce\0\x40\0\0", b"\xce\0\x50\0\0")),
    }[path]()  # fmt: skip


@pytest.mark.parametrize(
    "what",
    ["no state", "no mem", "short mem", "long mem", "short state", "empty state", "other state", "another format",
     "more memory"],
)  # fmt: skip
def test_one_that_is_not_whole_is_refused_and_nothing_changes(vm, saved, server, what):
    broken(saved, what)
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    before = other.read("registers")
    assert other.read("snap/in/info").splitlines()[0] == "arriving" and "wrong " in other.read("snap/in/info")
    assert failing(lambda: other.write("restore", "in\n")) == errno.EINVAL
    assert other.read("error").startswith("restore: in is no whole machine: ") and other.read("error").count("\n") == 1
    assert failing(lambda: other.write("fork", "of-broken from in\n")) == errno.EINVAL
    assert other.read("registers") == before and other.read("mem_size") == f"{128 << 20}\n"
    (other / "snap" / "in").rmdir()
    assert os.listdir(other / "snap") == []
    other.path.rmdir()


def test_one_that_was_mended(vm, saved, server):
    broken(saved, "short mem")
    other = server.make()
    subprocess.run(["cp", "-r", saved, other / "snap" / "in"], check=True)
    assert failing(lambda: other.write("restore", "in\n")) == errno.EINVAL
    os.truncate(other / "snap" / "in" / "mem", SMALL)
    other.write("restore", "in\n")
    assert number(other) == 1
    other.path.rmdir()


def test_with_a_disk_and_an_image(server, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    vm, other = server.make(), server.make()
    vm.write("machine", "pc\n")
    vm.write("dev/add", f"blk {image} cow\n")
    vm.write("dev/add", "rng\n")
    vm.write("initrd", b"an initrd")
    (vm / "snap" / "one").mkdir()
    assert os.listdir(vm / "snap" / "one" / "images") == ["initrd"]
    subprocess.run(["cp", "-r", vm / "snap" / "one", tmp_path / "saved"], check=True)
    vm.path.rmdir()
    subprocess.run(["cp", "-r", tmp_path / "saved", other / "snap" / "in"], check=True)
    other.write("restore", "in\n")
    assert {"blk0", "rng0"} <= set(os.listdir(other / "dev")) and other.read("initrd") == "an initrd"
    assert other.read("machine") == "pc\n" and "mode cow" in other.read("dev/blk0/info")
    other.path.rmdir()
    third = server.make()
    image.unlink()
    subprocess.run(["cp", "-r", tmp_path / "saved", third / "snap" / "in"], check=True)
    assert failing(lambda: third.write("restore", "in\n")) == errno.ENOENT and str(image) in third.read("error")
    assert third.read("machine") == "bare\n"
    image.write_bytes(bytes(2 << 20))
    assert failing(lambda: third.write("restore", "in\n")) == errno.EINVAL and third.read("machine") == "bare\n"
    third.path.rmdir()


# ---- one file


def vmfs(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmfs.cli", *map(str, words)], capture_output=True, text=True)


def test_one_file_there_and_back(vm, saved, server, tmp_path):
    put(vm, 0x300000, b"later")
    for which, later in ((vm.path, b"later"), (f"{vm.path}:one", bytes(5))):
        file = tmp_path / "file"
        assert vmfs("save", which, file).stderr == ""
        assert os.listdir(vm / "snap") == ["one"] and file.stat().st_mode & 0o077 == 0
        new = Machine(server.path / "loaded")
        assert vmfs("load", file, new.path).stderr == ""
        assert os.listdir(new / "snap") == [] and new.read("mem_size") == f"{SMALL}\n"
        assert number(new) == 1 and number(new, 0x300000) == int.from_bytes(later[:4], "little")
        assert new.run() == "hlt rip=0x1006\n" and number(new) == 2
        new.path.rmdir()
    subprocess.run(["tar", "--zstd", "-xf", file, "-C", tmp_path], check=True)
    assert (tmp_path / "machine" / "mem").read_bytes() == (saved / "mem").read_bytes()


def test_a_name_is_enough(vm, server, tmp_path, monkeypatch):
    """As for the other commands about machines."""
    monkeypatch.setenv("VMFS_MOUNT", str(server.path))
    vm.write("mem_size", f"{SMALL}\n")
    put(vm, 0, b"by name")
    file, loaded = tmp_path / "file", server.path / f"{vm.path.name}-again"
    assert vmfs("save", vm.path.name, file).returncode == 0
    assert vmfs("load", file, loaded.name).returncode == 0
    assert (loaded / "mem").read_bytes()[:7] == b"by name"
    loaded.rmdir()
    assert f"{vm.path} has no console" in vmfs("console", vm.path.name).stderr
    assert "there is no register layout 'vax'" in vmfs("gdb", vm.path.name, "vax").stderr


def test_a_file_that_is_cut_or_damaged_makes_no_machine(vm, server, tmp_path):
    vm.write("mem_size", f"{SMALL}\n")
    put(vm, 0, os.urandom(1 << 16))
    file, mutant = tmp_path / "file", tmp_path / "mutant"
    assert not vmfs("save", vm.path, file).returncode
    data = file.read_bytes()
    damaged = data[:5000] + bytes((data[5000] ^ 1,)) + data[5001:]
    for what in (b"", b"text\n" * 1000, data[:100], data[:-1], data[:300] + data[-300:], damaged):
        mutant.write_bytes(what)
        told = vmfs("load", mutant, server.path / "none")
        assert told.returncode == 1 and told.stderr.startswith("vmfs load: ") and told.stderr.count("\n") == 1, told
        assert not (server.path / "none").exists()


def test_what_cannot_be_saved_or_loaded(vm, saved, server, tmp_path):
    file = tmp_path / "file"
    for words, sentence in (
        (("save", tmp_path / "no", file), "is no machine"),
        (("save", f"{vm.path}:two", file), "has no snapshot two"),
        (("save", vm.path, tmp_path / "no" / "file"), "No such file"),
        (("load", file, server.path / "new"), "No such file"),
        (("load", saved / "mem", tmp_path / "new"), "is in no mount"),
        (("load", saved / "mem", vm.path), "File exists"),
    ):
        told = vmfs(*words)
        assert told.returncode == 1 and sentence in told.stderr and told.stderr.count("\n") == 1, told
    assert sorted(os.listdir(tmp_path)) == ["saved"]


@pytest.mark.parametrize("moment", [0.05, 0.3, 0.6])
def test_a_saver_that_is_killed_leaves_no_half_file(vm, tmp_path, moment):
    put(vm, 0, os.urandom(1 << 20) * 64)
    file = tmp_path / "file"
    file.write_bytes(b"before")
    saver = subprocess.Popen([sys.executable, "-m", "vmfs.cli", "save", str(vm.path), str(file)])
    time.sleep(moment)
    saver.kill()
    saver.wait()
    wait_until(lambda: not os.listdir(vm / "snap"), "what it has taken is gone")
    assert file.read_bytes() == b"before" or len(file.read_bytes()) > 1 << 20
    assert os.listdir(tmp_path) == ["file"]


def test_a_loader_that_is_killed_leaves_no_machine(vm, server, tmp_path):
    put(vm, 0, os.urandom(1 << 20) * 64)
    file, new = tmp_path / "file", server.path / "new"
    assert vmfs("save", vm.path, file).stderr == ""
    loader = subprocess.Popen([sys.executable, "-m", "vmfs.cli", "load", str(file), str(new)])
    wait_until(lambda: new.exists(), "it has begun")
    time.sleep(0.1)
    loader.kill()
    if loader.wait():
        wait_until(lambda: not new.exists(), "what it has made is gone")
    else:
        new.rmdir()


@pytest.mark.parametrize("who", ["server", "machine"])
@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2])
def test_what_is_saved_and_is_killed_leaves_no_half_file(own_server, tmp_path, who, moment):
    """With a past, while it runs: kill -9 of the machine's process, or of the server, which all die with."""
    server = own_server(engine="emulator", max_memory=2 << 30)
    vm = server.make().load(ONCE)
    put(vm, 0x100000, os.urandom(1 << 20) * 64)
    wait_until(lambda: has_history(vm))
    vm.run()
    pid = int(stat(vm)["pid"]) if who == "machine" else server.server.pid
    file = tmp_path / "file"
    file.write_bytes(b"before")
    command = [sys.executable, "-m", "vmfs.cli", "save", str(vm.path), str(file)]
    saver = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_until(lambda: os.listdir(vm / "snap") or saver.poll() is not None)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    said = saver.communicate(timeout=60)[1].decode()
    assert os.listdir(tmp_path) == ["file"]
    if saver.returncode:
        assert file.read_bytes() == b"before" and said.startswith("vmfs save: ") and "Traceback" not in said, said
    else:
        assert len(file.read_bytes()) > 1 << 20
    if who == "machine":
        vm.path.rmdir()


def test_a_file_of_an_earlier_release(server):
    """tests/mount/saved/bare-1.vmfs: a guest in real mode that has counted to 3, of 1 MiB, on the emulator. It is never
    written anew; a later format has a file of its own beside it."""
    new = Machine(server.path / "of-a-file")
    assert vmfs("load", Path(__file__).parent / "saved" / "bare-1.vmfs", new.path).stderr == ""
    assert new.read("engine") == "emulator\n" and new.read("state") == "halted\n" and number(new) == 3
    with open(new / "mem", "rb") as ram:
        ram.seek(0x8000)
        assert ram.read(50) == b"a saved machine of the first release that has them"
    assert new.run() == "hlt rip=0x1006\n" and number(new) == 4
    new.path.rmdir()
