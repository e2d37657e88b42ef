"""Lines as shells and programs write them, and what `error` says of it."""

from __future__ import annotations

import errno
import os
import re
import subprocess

import pytest
from mounting import SOON, failing, wait_until


def bash(script: str, vm) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=vm.path, capture_output=True, text=True, timeout=SOON, check=False)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (r"printf 'rax 1\nbogus 2\nrbx 3\n' > registers", "registers: line 2: there is no register 'bogus'"),
        (r"echo -e 'rax=1 rbx=2\nrcx=3 rdx=x' > registers", "registers: line 2: rdx: 'x' is not a number"),
        (r"printf 'rax 1\nrbx' | cat > registers", "registers: line 2: 'rbx' is not NAME VALUE"),
        (r"printf '5\nsix\n' > reg/rax", "rax: line 2: "),
        (r"printf '%s\n' 'break 0x1000' 'watch 0x2000 4 w' 'break' 'break 0x3000' > debug", "debug: line 3: "),
        (r"printf 'exits on\nfull drop\nno\n' > trace", "trace: line 3: "),
        (r"printf '0x1000 4\n0 0\n' > disasm", "disasm: line 2: "),
    ],
)
def test_bashs_own_printf_changes_all_or_nothing(vm, script, line):
    names = ("registers", "debug", "disasm", "state", "mode")
    before = [vm.read(name) for name in names]
    said = bash(script, vm)
    if "| cat" not in script:  # then it is cat's close(2) that fails
        assert said.returncode and "write error: Invalid argument" in said.stderr
    assert vm.read("error").startswith(line)
    assert [vm.read(name) for name in names] == before
    assert "trace off," in vm.read("stat")


def test_bashs_own_printf(vm):
    script = r"""
        set -e
        printf '# where it starts\nrip 0x2000\n\nrdx 0x60 rsi=7\n' > registers
        echo 'rax=1 rbx=2' > registers
        printf 'break 0x1000\nwatch 0x2000 4 w\n' > debug
        printf 1 > debug
        cat > cpu0/registers <<END
rcx 3
r9 = 4
END
    """
    assert bash(script, vm).returncode == 0
    values = {name: int(vm.read(f"reg/{name}"), 16) for name in "rip rdx rsi rax rbx rcx r9".split()}
    assert values == {"rip": 0x2000, "rdx": 0x60, "rsi": 7, "rax": 1, "rbx": 2, "rcx": 3, "r9": 4}
    assert re.fullmatch(r"1\n1 break 0x1000 .*\n2 watch 0x2000 4 w .*\n", vm.read("debug"))


def test_devices_of_a_change_that_fails_are_detached(vm, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(4096))
    vm.write("machine", "pc")
    before = set(os.listdir(vm / "dev"))
    assert bash(f"printf 'rng\nblk {tmp_path}/disk ro\nblk {tmp_path}/none ro\nhvc\n' > dev/add", vm).returncode
    assert set(os.listdir(vm / "dev")) == before
    assert vm.read("error").startswith(f"add: line 3: {tmp_path}/none: No such file")
    assert bash(f"printf 'rng\nblk {tmp_path}/disk ro\n' > dev/add", vm).returncode == 0
    vm.write("dev/add", f"rng\nhvc\nblk {tmp_path}/disk ro")
    assert set(os.listdir(vm / "dev")) - before == {"rng0", "rng1", "blk0", "blk1", "hvc0"}


def test_error_is_about_the_last_write_of_this_kind(vm):
    assert vm.read("error") == ""
    failing(vm.write, "registers", "bogus 1\n")
    failing(vm.write, "debug", "bogus\n")
    vm.write("registers", "rax 1\n")  # says nothing about debug
    assert vm.read("error").startswith("debug: ")
    vm.read("debug")
    assert vm.read("error").startswith("debug: ")
    vm.write("debug", "1")
    assert vm.read("error") == ""
    failing(vm.write, "reg/rax", "x\n")
    vm.write("reg/rbx", "1\n")
    assert vm.read("error") == ""
    failing(os.rmdir, vm / "cpu0")
    assert vm.read("error") == "cpu0: only a machine's directory can be removed\n"


def test_the_root_has_its_own_error(own_server):
    server = own_server(max_vms=1)
    assert (server.path / "error").read_text() == ""
    assert failing(os.mkdir, server.path / "a b") == errno.EINVAL
    assert (server.path / "error").read_text().startswith("a b: 'a b' is no name for a machine")
    os.mkdir(server.path / "a")
    assert (server.path / "error").read_text() == ""
    assert failing(os.mkdir, server.path / "b") == errno.ENOSPC
    assert (server.path / "error").read_text().startswith("b: ")
    assert (server.path / "a" / "error").read_text() == ""
    assert failing(os.open, server.path / "c", os.O_CREAT | os.O_WRONLY) == errno.EPERM
    assert (server.path / "error").read_text().startswith("c: ")


@pytest.mark.parametrize("machine", ["bare", "pc"])
def test_an_empty_machine_says_what_to_do(vm, machine):
    vm.write("machine", machine)
    line = vm.run()
    assert line.startswith('error reason="there is nothing to run at the reset vector: ')
    assert line.endswith(" rip=0xfff0\n")
    assert "`kernel`" in line and "`mode`" in line
    assert vm.read("exit") == line


def chatter(vm, pages: int) -> None:
    """A PC whose boot sector sends the bytes 0 to 255 to COM1, that often, and then loops."""
    code = "66b9" + pages.to_bytes(4, "little").hex() + "baf803 30c0 ee fec0 75fb 6649 75f5 ebfe"
    vm.write("machine", "pc")
    vm.write("kernel", bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")


def test_the_log_of_the_console(server, vm):
    assert failing(vm.read, "console.log") == errno.EOPNOTSUPP
    chatter(vm, 3)
    assert vm.read("console.log") == "" and failing(os.open, vm / "console.log", os.O_WRONLY) == errno.EACCES
    console = os.open(vm / "console", os.O_RDONLY | os.O_NONBLOCK)
    vm.write("state", "run")
    wait_until(lambda: (vm / "console.log").stat().st_size == 3 * 256, "all is sent")  # also while it runs
    sent = bytes(range(256)) * 3
    assert (vm / "console.log").read_bytes() == sent
    assert os.read(console, 4096) == sent  # its readers do not notice
    os.close(console)
    vm.write("state", "pause")
    vm.write("state", "reset")
    assert (vm / "console.log").read_bytes() == sent
    with (vm / "console.log").open("rb") as log:
        log.seek(-3, os.SEEK_END)
        assert log.read() == sent[-3:]


def test_tail_follows_the_log(vm):
    chatter(vm, 1)
    tail = subprocess.Popen(["tail", "-c", "+1", "-s", "0.1", "-f", vm / "console.log"], stdout=subprocess.PIPE)
    try:
        for _ in range(2):
            vm.write("state", "run")
            assert tail.stdout.read(256) == bytes(range(256))
            vm.write("state", "pause")
            vm.write("state", "reset")
    finally:
        tail.kill()
        tail.communicate()
