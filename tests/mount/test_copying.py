"""Programs that copy, pack, compare and measure whole machines at rest: what they get is what reading gives, nothing
hangs, and nothing runs the guest. Many of them ask stat for the size, and read so many bytes."""

from __future__ import annotations

import http.client
import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from mounting import SOON, Machine

from vmfs.machine.files.devices import OWN_KINDS
from vmfs.machine.files.table import CONTENTS

STORE_HLT = "c606003001 f4"  # mov byte [0x3000], 1; hlt
# A boot sector: `A` to COM1, then it loops.
SECTOR = bytes.fromhex("baf803 b041 ee ebfe").ljust(510, b"\0") + b"\x55\xaa"
SMALL = "2M"  # of RAM: these programs read all of it


def _bare(vm: Machine) -> Machine:
    vm.write("mem_size", SMALL)
    vm.load(STORE_HLT).run()
    vm.write("debug", "break 0x1000\nwatch 0x2000 4 w\n")
    vm.write("cmdline", "root=/dev/vda")
    return vm


def _pc(vm: Machine) -> Machine:
    vm.write("mem_size", SMALL)
    vm.write("machine", "pc")
    vm.write("kernel", SECTOR)
    vm.write("dev/add", "rng")
    vm.write("vm_run", "for 50ms")
    return vm


@pytest.fixture(scope="module")
def resting(server):
    """A machine that has run and rests: a PC on the emulator, a bare one on KVM. (Each test reads all its files.)"""
    vm = server.make()
    is_bare = vm.read("engine") == "kvm\n"
    vm = (_bare if is_bare else _pc)(vm)
    before = _inside(vm)
    yield vm
    assert _inside(vm) == before
    if is_bare:
        assert (vm / "dirty").read_bytes()[0] == 1 << 3, "a mere look has taken the dirty log"
    vm.path.rmdir()


def _inside(vm: Machine) -> dict[str, bytes]:
    """What shows whether the guest has run."""
    names = ("stat", "state", "exit", "regs", "sregs", "debug")
    return {name: _without_lane(name, (vm / name).read_bytes()) for name in names}


def _without_lane(name: str, data: bytes) -> bytes:
    """`stat` counts reads of `regs`; all else of it stands while the guest does."""
    if name != "stat":
        return data
    return b"".join(line for line in data.splitlines(keepends=True) if not line.startswith(b"lane_"))


def _walk(path: Path) -> list[Path]:
    return sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)


_OWN = {name: kind for own in OWN_KINDS.values() for name, kind in own.items()}  # in directories of devices
_KINDS = {**CONTENTS, **_OWN}
_NO_FILES = {name for name, kind in _KINDS.items() if not kind.walked or not kind.readable} | {"add", "dirty", "fork"}


def _contents(vm: Machine) -> dict[str, bytes]:
    """Of all files that have some, by reading each to its end."""
    contents = {}
    for path in _walk(vm.path):
        if path.name not in _NO_FILES:
            try:
                contents[str(path.relative_to(vm.path))] = path.read_bytes()
            except OSError:
                contents[str(path.relative_to(vm.path))] = b""
    return contents


def _run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, timeout=SOON, capture_output=True, text=True, check=False, **options)


def _assert_copied(copy: Path, vm: Machine) -> None:
    for name, data in _contents(vm).items():
        if name not in PASSING:
            assert (copy / name).read_bytes() == data, name
    for path in _walk(vm.path):
        if path.name in _KINDS and not _KINDS[path.name].walked:
            assert (copy / path.relative_to(vm.path)).stat().st_size == 0, path


# What could not be read is told in `error` meanwhile; on KVM, the clock goes on.
PASSING = {"error", "clock", "reg/msr.0x10", "cpu0/reg/msr.0x10", "msrs", "cpu0/msrs", "lapic", "cpu0/lapic", "pit"}


def test_sizes_are_what_reading_gives(resting):
    contents = _contents(resting)
    assert len(contents) > 200
    for name, data in contents.items():
        if name != "error":
            assert os.lstat(resting / name).st_size == len(data), name
    assert os.lstat(resting / "error").st_size == len((resting / "error").read_bytes())
    for name in _NO_FILES - {"add", "dirty", *_OWN}:
        assert os.lstat(resting / name).st_size == 0, name


def test_tar(resting, tmp_path):
    made = _run("tar", "-C", resting.path.parent, "-cf", tmp_path / "a.tar", resting.path.name)
    assert "File shrank" not in made.stderr and "padding" not in made.stderr, made.stderr
    assert _run("tar", "-C", tmp_path, "-xf", tmp_path / "a.tar").returncode == 0
    _assert_copied(tmp_path / resting.path.name, resting)


def test_tar_of_sparse_files(resting, tmp_path):
    """-S takes a file that has no blocks for a hole."""
    _run("tar", "-C", resting.path.parent, "-Scf", tmp_path / "a.tar", resting.path.name)
    assert _run("tar", "-C", tmp_path, "-xf", tmp_path / "a.tar").returncode == 0
    _assert_copied(tmp_path / resting.path.name, resting)


def test_cp(resting, tmp_path):
    _run("cp", "-a", resting.path, tmp_path / "copy")
    _assert_copied(tmp_path / "copy", resting)


@pytest.mark.skipif(not shutil.which("rsync"), reason="there is no rsync")
def test_rsync(resting, tmp_path):
    for _ in range(2):
        made = _run("rsync", "-a", f"{resting.path}/", tmp_path / "copy")
        assert made.returncode in (0, 23), made.stderr  # 23: what cannot be opened for reading
        _assert_copied(tmp_path / "copy", resting)


@pytest.mark.skipif(not shutil.which("rsync"), reason="there is no rsync")
def test_rsync_sees_what_has_changed(server, tmp_path):
    """By size and mtime."""
    vm = server.make()
    for number in (1, 2):
        vm.write("reg/rax", f"{number}")
        subprocess.run(["sleep", "1.1"], check=True)  # an mtime may be a second old
        _run("rsync", "-a", vm / "registers", vm / "regs", vm / "reg/rax", tmp_path)
        assert f"rax 0x{number:016x}\n" in (tmp_path / "registers").read_text()
        assert (tmp_path / "regs").read_bytes()[0] == number
        assert int((tmp_path / "rax").read_text(), 16) == number
    vm.path.rmdir()


def test_diff(resting, server, tmp_path):
    _run("cp", "-a", resting.path, tmp_path / "copy")
    said = _run("diff", "-r", resting.path, tmp_path / "copy").stdout
    told = {os.path.relpath(line.split()[-1], tmp_path / "copy") for line in said.splitlines() if line[:5] == "diff "}
    assert told <= PASSING, said
    other = server.make()
    assert "registers" in _run("diff", "-rq", resting.path, other.path).stdout
    assert _inside(other)["stat"].startswith(b"runs 0\n")
    other.path.rmdir()


def test_du_and_find(resting):
    files = {info.st_ino: info.st_size for info in map(os.lstat, _walk(resting.path))}
    sizes = sum(files.values())
    apparent = int(_run("du", "-s", "-B1", "--apparent-size", resting.path).stdout.split()[0])
    assert sizes <= apparent < sizes + (1 << 20)  # directories count, too
    used = int(_run("du", "-s", "-B1", resting.path).stdout.split()[0])
    assert used < apparent  # RAM that was not touched costs nothing
    found = _run("find", resting.path, "-type", "f", "-size", "+100M").stdout
    assert found == ""
    empty = set(_run("find", resting.path, "-maxdepth", "1", "-type", "f", "-empty", "-printf", "%f\n").stdout.split())
    assert {"vm_run", "console", "trace", "virt"} <= empty and not {"registers", "regs", "stat", "core"} & empty


def test_grep(resting):
    assert "/registers:rip 0x" in _run("grep", "-r", "^rip ", resting.path).stdout


PLAIN = ("registers", "reg/rax", "regs", "pagetable", "stat", "core", "mem", "disasm", "cmdline")


def test_copyfile(resting, tmp_path):
    """By sendfile(2), which goes through the page cache, where read(2) does not."""
    for name in PLAIN:
        expected = (resting / name).read_bytes()
        for _ in range(2):
            shutil.copyfile(resting / name, tmp_path / "one")
            assert (tmp_path / "one").read_bytes() == expected, name
    resting.write("cmdline", "something else")
    shutil.copyfile(resting / "cmdline", tmp_path / "one")
    assert (tmp_path / "one").read_text() == "something else\n"


def test_readers_with_and_without_the_page_cache_agree(resting):
    name = resting / "cmdline"
    for text in ("a", "a longer one", "b"):
        resting.write("cmdline", text)
        with name.open("rb") as file, open(os.memfd_create("copy"), "r+b") as copy:
            size = os.fstat(file.fileno()).st_size
            assert os.sendfile(copy.fileno(), file.fileno(), 0, 1 << 20) == size
            assert os.pread(copy.fileno(), 100, 0) == os.pread(file.fileno(), 100, 0) == f"{text}\n".encode()


def test_git_hash_object(resting, tmp_path):
    for name in PLAIN:
        (tmp_path / "one").write_bytes((resting / name).read_bytes())
        assert _run("git", "hash-object", resting / name).stdout == _run("git", "hash-object", tmp_path / "one").stdout


def test_an_http_server(resting):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(resting.path))

        def log_message(self, *arguments) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            for name in PLAIN:
                connection = http.client.HTTPConnection(*web.server_address, timeout=SOON)
                connection.request("GET", f"/{name}")
                assert connection.getresponse().read() == (resting / name).read_bytes(), name
                connection.close()
        finally:
            web.shutdown()
            thread.join()


@pytest.mark.skipif(not shutil.which("sftp"), reason="there is no sftp")
def test_sftp(resting, tmp_path):
    program = next((path for path in SFTP_SERVERS if path.exists()), None)
    if program is None:
        pytest.skip("there is no sftp-server")
    commands = "".join(f"get {resting / name} {tmp_path / str(at)}\n" for at, name in enumerate(PLAIN))
    said = _run("sftp", "-q", "-D", program, "-b", "-", input=commands)
    assert said.returncode == 0, said.stderr
    for at, name in enumerate(PLAIN):
        copied = (tmp_path / str(at)).read_bytes()
        assert _without_lane(name, copied) == _without_lane(name, (resting / name).read_bytes()), name


@pytest.mark.skipif(not shutil.which("sshfs"), reason="there is no sshfs")
def test_sshfs(server, tmp_path):
    """A machine is made, run and removed through it. What ssh would start on the other host is started here."""
    program = next((path for path in SFTP_SERVERS if path.exists()), None)
    if program is None:
        pytest.skip("there is no sftp-server")
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {program}\n")
    ssh.chmod(0o755)
    there = tmp_path / "there"
    there.mkdir()
    said = _run("sshfs", "-o", f"direct_io,ssh_command={ssh}", f"host:{server.path}", there)
    assert said.returncode == 0, said.stderr
    try:
        vm = there / f"far-{os.urandom(3).hex()}"
        vm.mkdir()
        (vm / "mode").write_text("real\n")
        with (vm / "mem").open("r+b") as memory:
            memory.seek(0x1000)
            memory.write(bytes.fromhex("b041e660f4"))  # mov al, 0x41; out 0x60, al; hlt
        (vm / "reg/rip").write_text("0x1000\n")
        assert (vm / "vm_run").read_text() == "io direction=out port=0x60 size=1 count=1 data=0x41 rip=0x1004\n"
        assert (vm / "vm_run").read_text() == "hlt rip=0x1005\n"
        assert (vm / "reg/rax").read_text() == (server.path / vm.name / "reg/rax").read_text()
        vm.rmdir()
        assert not (server.path / vm.name).exists()
    finally:
        subprocess.run(["fusermount3", "-uz", there], check=True)


SFTP_SERVERS = (Path("/usr/lib/openssh/sftp-server"), Path("/usr/lib/sftp-server"))


def test_dd_finds_its_place_in_virt(server):
    """It has no size, as /proc/PID/mem, and can be read anywhere."""
    vm = server.make().load("90")
    with (vm / "mem").open("r+b") as mem:
        mem.seek(0x123456)
        mem.write(b"here")
    said = _run("dd", f"if={vm / 'virt'}", "bs=1", f"skip={0x123456}", "count=4", "status=none")
    assert (said.stdout, said.stderr) == ("here", "")
    vm.path.rmdir()
