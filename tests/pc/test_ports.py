"""Linux and the ports that its user sees as streams: a second serial port, one more, a printer; the speaker's tone; and
the SMBus."""

from __future__ import annotations

import os
import subprocess

import pytest
from mounting import has_news, wait_until
from pc.conftest import BOOT_SECONDS, boot_linux
from pc.kernels import GENERIC, needs_kernels

pytestmark = needs_kernels

# `tone`: struct input_event of EV_SND, SND_TONE, with the two lower bytes of a frequency.
TONES = rb"""
exec 7> /dev/input/$(cd /sys/class/input; grep -l Speaker event*/device/name | cut -d/ -f1)
tone() { printf '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\022\0\002\0\'$1'\'$2'\0\0' >&7; }
"""


SMBUS = rb"""#!/bin/sh
smbus() { i2c$1 -y 0 $2 $3 $4 $5; }
smbus get 0x50 2
smbus get 0x50 4 w
smbus set 0x50 0xf8 0x1234 w
smbus set 0x50 0xfa 0x34
smbus set 0x50 0xfb 0x07
smbus get 0x50 0xf9
smbus get 0x50 0xfa w
smbus get 0x51 0 2>/dev/null || echo none
"""


def opened(pc, name):
    return os.open(pc.path / "dev" / name, os.O_RDWR | os.O_NONBLOCK)


def hears(fd, wanted: bytes) -> bytes:
    heard = b""
    while wanted not in heard:
        assert has_news(fd, seconds=BOOT_SECONDS), heard
        heard += os.read(fd, 4096)
    return heard


def test_serial_ports_a_printer_a_tone_and_the_smbus(make_pc):
    pc = make_pc()
    pc.write("dev/add", "uart 0x2a0 5\n")
    modules = "parport_pc", "lp", "evdev", "pcspkr", "i2c_piix4", "i2c_dev"
    boot_linux(
        pc, cmdline="8250.nr_uarts=5", kernel=GENERIC, modules=modules, files={"bin/tones": TONES, "bin/smbus": SMBUS},
    )  # fmt: skip
    pc.expect("guest# ")
    second = opened(pc, "com2/stream")
    pc.shell("stty -F /dev/ttyS1 raw -echo")
    pc.shell("echo from the guest > /dev/ttyS1")
    hears(second, b"from the guest\n")
    pc.type("head -n 1 /dev/ttyS1; echo status=$?\n")
    pc.expect(r"echo status=\$\?\r\n")
    os.write(second, b"to the guest\n")
    pc.expect("to the guest\r\nstatus=0\r\nguest# ")
    os.close(second)
    assert pc.read("dev/com2/log") == "from the guest\n"

    assert pc.shell("dmesg | grep -o 'ttyS4 at .*'") .startswith("ttyS4 at I/O 0x2a0 (irq = 5, ")
    fifth = opened(pc, "uart0/stream")
    pc.shell("stty -F /dev/ttyS4 raw -echo")
    pc.shell("echo by another port > /dev/ttyS4")
    hears(fifth, b"by another port\n")
    pc.type("head -n 1 /dev/ttyS4; echo status=$?\n")
    pc.expect(r"echo status=\$\?\r\n")
    os.write(fifth, b"and back\n")
    pc.expect("and back\r\nstatus=0\r\nguest# ")
    os.close(fifth)

    assert "SMBus Host Controller at 0x700" in pc.shell("dmesg | grep piix4_smbus")
    assert pc.shell("smbus") == "0x0b\n0x1100\n0x12\n0x0734\nnone\n"  # DDR3, of 256 MiB; what was written

    with subprocess.Popen(["head", "-n", "2", pc.path / "dev/lpt1/stream"], stdout=subprocess.PIPE) as printer:
        wait_until(lambda: open_streams(printer.pid), "the reader has its stream")
        assert "PCSPP" in pc.shell("dmesg | grep parport0")
        pc.shell("echo a line > /dev/lp0; echo and another > /dev/lp0")
        assert printer.communicate(timeout=BOOT_SECONDS)[0] == b"a line\nand another\n"
    assert pc.read("dev/lpt1/log") == "a line\nand another\n"
    with pytest.raises(PermissionError):
        os.close(os.open(pc.path / "dev/lpt1/stream", os.O_WRONLY))

    assert pc.read("dev/speaker/tone") == "off\n"
    pc.shell(". /bin/tones && tone 270 001")  # 440 Hz, in octal
    assert float(pc.read("dev/speaker/tone")) == pytest.approx(440, abs=0.3)
    pc.shell("tone 000 000")
    assert pc.read("dev/speaker/tone") == "off\n"


def open_streams(pid: int) -> list[str]:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return [link for link in links if link.endswith("/stream")]
