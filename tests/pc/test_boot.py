"""A stock Debian kernel boots from files, to a shell that is used through `console`."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from pc.conftest import BOOT_SECONDS, boot_linux
from pc.initramfs import build
from pc.kernels import CLOUD, GENERIC, needs_kernels

from vmfs.commands.terminal import ESCAPED

pytestmark = needs_kernels


def test_a_kernel_boots_to_a_shell_and_powers_off(linux):
    """As in the README: machine, kernel, initrd, cmdline, console, vm_run."""
    pc = linux()
    assert pc.shell("echo $((6 * 7)) and more") == "42 and more\n"
    assert f"Linux (none) {CLOUD.release} " in pc.shell("uname -a")
    assert "PAT: Configuration [0-7]: WB  WC  UC- UC  WB  WP  UC- WT" in pc.shell("dmesg | grep PAT")
    ranges = pc.shell("cat /proc/mtrr")
    assert re.fullmatch(r"reg00: base=0x0e0000000 \( *3584MB\), size= *512MB.*: uncachable\n", ranges)
    assert "PCI: Using ACPI for IRQ routing" in pc.shell("dmesg | grep ACPI")
    # What it found of the machine is what dev/ has.
    assert "0: uart:16550A port:000003F8 irq:4" in pc.shell("cat /proc/tty/driver/serial")
    assert "rtc_cmos" in pc.shell("cat /sys/class/rtc/rtc0/name")
    seconds = int(pc.shell("date +%s"))
    assert abs(seconds - time.time()) < 60
    pci = pc.shell("cat /sys/bus/pci/devices/0000:00:00.0/vendor")
    assert pci == "0x8086\n"
    pc.type("poweroff -f\n")
    assert pc.ended().startswith("shutdown cause=poweroff rip=0x")
    assert pc.read("state") == "shutdown\n"
    pc.rest()
    assert os.read(pc.console, 1) == b""


def test_reboot_is_a_reset_and_the_next_run_boots_again(make_pc):
    pc = boot_linux(make_pc(), 'echo "boot $(cat /proc/cmdline)"; reboot -f\n', cmdline="one")
    pc.expect("boot .*one")
    assert pc.ended().startswith("shutdown cause=reset rip=0x")
    assert pc.read("state") == "paused\n"
    assert pc.read("registers").split("rip ")[1].split()[0] == "0x000000000000fff0"
    pc.write("cmdline", "console=ttyS0 quiet two")
    pc.start()
    pc.expect("boot .*two")
    assert pc.ended().startswith("shutdown cause=reset rip=0x")


def test_a_machine_that_could_not_boot_is_as_it_was(make_pc):
    """The user who is told that a kernel does not fit gives the machine more RAM, and goes on."""
    pc = make_pc()
    pc.write("mem_size", "32M")
    pc.load("kernel", CLOUD.image)
    for image, sentence in ((CLOUD.image, "RAM ends at 0x2000000"), (CLOUD.image.read_bytes()[:-9999], "truncated")):
        pc.load("kernel", image)
        with pytest.raises(OSError, match="Invalid argument"):
            pc.read("vm_run")
        assert sentence in pc.read("error") and pc.read("state") == "paused\n"
    pc.write("mem_size", "64M")
    pc.write("dev/add", "rng")
    (pc.path / "dev/rng0").rmdir()
    pc.write("machine", "bare")
    pc.write("machine", "pc")
    pc.load("kernel", b"\xe6\xf4".ljust(510, b"\0") + b"\x55\xaa")  # a boot sector: out 0xf4, al
    assert pc.read("vm_run").startswith("shutdown cause=debug-exit code=")
    for name, text in (("mem_size", "128M"), ("dev/add", "rng"), ("machine", "bare")):
        with pytest.raises(OSError, match="busy"):
            pc.write(name, text)


def test_the_generic_kernel_boots(make_pc):
    pc = boot_linux(make_pc(), 'echo "version $(uname -r)"; poweroff -f\n', kernel=GENERIC, mem="512M")
    assert pc.expect(r"version (\S+)\r\n")[1] == GENERIC.release
    assert pc.ended().startswith("shutdown cause=poweroff")


def test_every_reader_of_the_console_gets_all_from_when_it_opened_it(linux, tmp_path):
    pc = linux()
    files = [tmp_path / name for name in "ab"]
    readers = [subprocess.Popen(["cat", pc.path / "console"], stdout=open(file, "wb")) for file in files]
    try:
        deadline = time.monotonic() + BOOT_SECONDS
        while not all(_has_open(one.pid, pc) for one in readers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pc.shell("seq 1 500")
        pc.type("poweroff -f\n")
        pc.ended()
        assert all(one.wait(BOOT_SECONDS) == 0 for one in readers)  # the end of the file
    finally:
        for one in readers:
            one.kill()
    texts = [file.read_bytes().decode(errors="replace") for file in files]
    pc.rest()
    assert texts[0] == texts[1] and pc.said.endswith(texts[0])
    assert "\r\n499\r\n500\r\n" in texts[0]


def _has_open(pid: int, pc) -> bool:
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == str(pc.path / "console"):
                return True
    return False


def test_what_is_typed_is_never_lost(linux):
    """More than the UART and the queue before it hold, before the guest reads any of it."""
    pc = linux()
    lines = [f"{number:04d} {'x' * 60}" for number in range(200)]
    pc.type("stty -echo; wc -c\n")
    pc.expect(r"wc -c\r\n")
    for line in lines:
        pc.type(line + "\n")
    pc.type("\x04")
    assert int(pc.expect(r"(\d+)\r\n")[1]) == sum(len(line) + 1 for line in lines)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"#!/bin/sh\n", "vm_run: kernel: not an image that can be booted"),
        (None, "truncated"),  # the first half of a kernel
    ],
)
def test_what_cannot_be_booted_is_refused_and_the_machine_is_usable(make_pc, image, sentence):
    pc = make_pc()
    whole = CLOUD.image.read_bytes()
    pc.load("kernel", image if image is not None else whole[: len(whole) // 2])
    before = pc.read("registers")
    with pytest.raises(OSError) as caught:
        pc.read("vm_run")
    assert caught.value.errno == 22 and sentence in pc.read("error")
    assert pc.read("registers") == before and pc.read("state") == "paused\n"
    pc.load("kernel", whole)
    pc.write("cmdline", "console=ttyS0")
    pc.start()
    pc.expect("Linux version")


def test_an_initrd_larger_than_ram_is_refused(make_pc):
    pc = make_pc()
    pc.load("kernel", CLOUD.image)
    with open(pc.path / "initrd", "wb") as initrd:
        initrd.truncate(200 << 20)
    with pytest.raises(OSError) as caught:
        pc.read("vm_run")
    assert caught.value.errno == 22 and "initrd" in pc.read("error")
    assert pc.read("error").count("\n") == 1


def test_vmfs_boot_makes_runs_and_removes_a_machine(pc_mount, tmp_path):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build())
    before = set(os.listdir(pc_mount))
    vmfs = [sys.executable, "-m", "vmfs.cli"]
    command = [*vmfs, "boot", CLOUD.image, "--initrd", initrd, "--on", pc_mount, "--cmdline", "console=ttyS0 quiet"]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True)
    os.close(terminal)
    try:
        said = b""
        while b"guest# " not in said:
            said += os.read(controller, 4096)
        assert set(os.listdir(pc_mount)) - before == {f"boot-{process.pid}"}
        os.write(controller, b"echo $((6*7)); poweroff -f\n")
        assert process.wait(BOOT_SECONDS) == 0
        said += os.read(controller, 65536)
        assert b"\r\n42\r\n" in said
        assert process.stderr is not None
        errors = process.stderr.read()
        assert "vmfs boot: shutdown cause=poweroff rip=0x" in errors and "Ctrl-] ends it" in errors
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert set(os.listdir(pc_mount)) == before


SECTOR = bytes.fromhex("B041BAF803EEEBFE").ljust(510, b"\0") + b"\x55\xaa"  # "A" on COM1, and hangs


@pytest.mark.parametrize("how", ["key", "signal", "kill"])
def test_vmfs_boot_ends_and_takes_the_machine_along(pc_mount, tmp_path, how):
    """The guest reads nothing of what was typed, which is more than waits for it."""
    before = set(os.listdir(pc_mount))
    (tmp_path / "sector").write_bytes(SECTOR)
    command = [sys.executable, "-m", "vmfs.cli", "boot", tmp_path / "sector", "--on", pc_mount]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    try:
        while b"A" not in os.read(controller, 4096):
            pass
        for _ in range(8):
            os.write(controller, b"x" * 1024)  # it is raw, and waits where the program reads nothing
        if how == "key":
            os.write(controller, b"\x1d")
            assert process.wait(BOOT_SECONDS) == ESCAPED
        elif how == "signal":
            process.terminate()
            assert process.wait(BOOT_SECONDS) == 128 + 15
        else:
            process.kill()
            process.wait()
            deadline = time.monotonic() + BOOT_SECONDS
            while set(os.listdir(pc_mount)) != before:  # by the shell that it has left behind
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert set(os.listdir(pc_mount)) == before


def test_vmfs_boot_types_a_file_and_ends_where_the_guest_has_not_read_it(pc_mount, tmp_path):
    (tmp_path / "sector").write_bytes(bytes.fromhex("B001E6F4").ljust(510, b"\0") + b"\x55\xaa")  # debug exit
    command = [sys.executable, "-m", "vmfs.cli", "boot", tmp_path / "sector", "--on", pc_mount]
    done = subprocess.run(command, input=b"y" * 50000, capture_output=True, timeout=BOOT_SECONDS, check=False)
    assert (done.returncode, done.stdout) == (3, b"") and b"cause=debug-exit code=3 " in done.stderr


def test_commands_typed_before_the_kernel_is_there_reach_its_shell(pc_mount, tmp_path):
    """`vmfs boot KERNEL --initrd INITRD < commands`"""
    (tmp_path / "initrd").write_bytes(build())
    command = [sys.executable, "-m", "vmfs.cli", "boot", CLOUD.image, "--initrd", tmp_path / "initrd", "--on", pc_mount]
    typed = b"echo $((6 * 7)) to the shell\n" + b"poweroff -f\n"
    done = subprocess.run(command, input=typed, capture_output=True, timeout=BOOT_SECONDS, check=False)
    assert done.returncode == 0 and b"shutdown cause=poweroff" in done.stderr
    assert b"\r\n42 to the shell\r\n" in done.stdout


@pytest.mark.parametrize("clock", ["host", "instructions"])
def test_linux_sets_the_real_time_clock_and_gets_its_alarm(make_pc, clock):
    """By rtc_cmos: SET, the divider in reset, ten bytes; and an alarm in the guest's time."""
    pc = make_pc()
    pc.write("time", clock)
    boot_linux(pc)
    pc.expect("guest# ")
    pc.shell("date -u -s '2027-02-15 11:59:58'")
    pc.shell("hwclock -w -u -f /dev/rtc0")
    pc.shell("echo +2 > /sys/class/rtc/rtc0/wakealarm")
    pc.shell("sleep 4")
    # By instructions, an idle guest's time flies.
    shown = pc.shell("hwclock -r -u -f /dev/rtc0")
    assert re.match(r"Mon Feb 15 12:00:0" if clock == "host" else r"Mon Feb 15 1[2-9]:", shown) and " 2027 " in shown
    # It is ACPI's event, since the line is the HPET's, to a Linux that has one.
    assert re.search(r"^ +[1-9]", pc.shell("cat /sys/firmware/acpi/interrupts/ff_rt_clk")), shown
    assert "\nport=0x80 reads=0 writes=" in "\n" + pc.read("dev/unclaimed")


def test_ram_above_4_gib_is_used(make_pc):
    """6 GiB: the kernel finds all of it, and what it writes above 4 GiB is in `mem` at that address."""
    end = (6 << 30) + (512 << 20)
    pc = boot_linux(make_pc(), mem="6G")
    pc.expect("guest# ")
    total = int(pc.shell("grep MemTotal /proc/meminfo").split()[1])
    assert 5_800_000 < total < 6 * 1024 * 1024
    assert "100000000-19fffffff : System RAM" in pc.shell("cat /proc/iomem")
    assert os.stat(pc.path / "mem").st_size == end
    before = pc.shell("cat /proc/zoneinfo | grep -A1 'zone *Normal' | tail -1")
    assert int(before.split()[-1]) > 100_000  # pages free above 4 GiB
    pc.shell("head -c 8000000 /dev/zero | tr '\\0' Q > /pattern")
    pc.write("state", "pause")
    with (pc.path / "mem").open("rb", buffering=0) as ram:
        ram.seek(4 << 30)
        while (start := os.lseek(ram.fileno(), 0, os.SEEK_CUR)) < end:
            block = ram.read(1 << 20)
            if b"Q" * 4096 in block:
                break
        assert start >= 4 << 30 and b"Q" * 4096 in block
