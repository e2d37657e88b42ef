"""`vmfs boot` and debugging together: it stays while the machine stands, and tells how it ended."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine import asm
from pc.conftest import BOOT_SECONDS
from pc.initramfs import build
from pc.kernels import BUSYBOX, GENERIC, needs_kernels
from pc.media import GRUB, ON_SERIAL, SEABIOS, grub_iso, needs

TRIPLE_FAULT = bytes.fromhex("0F011E007E CD00")  # lidt [0x7e00], which is empty; int 0
SLEEP = bytes.fromhex("FAF4")  # cli; hlt


def sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa"


def boot_command(mount, *arguments):
    return [sys.executable, "-m", "vmfs.cli", "boot", *map(str, arguments), "--on", str(mount)]


@pytest.mark.parametrize(
    ("code", "options", "status", "words"),
    [
        (TRIPLE_FAULT, (), 6, ("shutdown cause=triple-fault", "rip 0x7c05, ", "cr2 ")),
        (SLEEP, (), 10, ("hlt rip=0x7c02",)),
        (b"\xeb\xfe", ("--timeout", "300ms"), 8, ("the time is over: ",)),
        (b"\xb0\x02\xe6\xf4", (), 5, ("shutdown cause=debug-exit code=5",)),
    ],
)
def test_each_end_of_vmfs_boot_has_its_code(pc_mount, tmp_path, code, options, status, words):
    before = set(os.listdir(pc_mount))
    (tmp_path / "sector").write_bytes(sector(code))
    command = boot_command(pc_mount, tmp_path / "sector", *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOOT_SECONDS, stdin=subprocess.DEVNULL)
    assert done.returncode == status, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert set(os.listdir(pc_mount)) == before  # nobody is at a terminal, to look at it


def test_a_machine_that_has_faulted_is_left_to_its_user(pc_mount, tmp_path):
    (tmp_path / "sector").write_bytes(sector(TRIPLE_FAULT))
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        boot_command(pc_mount, tmp_path / "sector", "--name", "faulted"),
        stdin=terminal, stdout=terminal, stderr=terminal,
    )
    os.close(terminal)
    try:
        assert process.wait(BOOT_SECONDS) == 6
        assert f"the machine is {pc_mount}/faulted, to look at" in os.read(controller, 65536).decode()
        assert "rip 0x0000000000007c05\n" in (Path(pc_mount) / "faulted/registers").read_text()
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        (Path(pc_mount) / "faulted").rmdir()


def test_vmfs_boot_stays_while_the_machine_stands(pc_mount, tmp_path):
    """Paused from elsewhere, it says so once, and goes on with the machine, to its end."""
    # Counts at 0x7e00 until a byte there is set.
    (tmp_path / "sector").write_bytes(sector(bytes.fromhex("FF06007E 803E027E00 74F5 B001E6F4")))
    process = subprocess.Popen(
        boot_command(pc_mount, tmp_path / "sector", "--name", "stood"), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    machine = Path(pc_mount) / "stood"
    try:
        wait_for(lambda: machine.exists() and (machine / "state").read_text() == "running\n")
        wait_for(lambda: counted(machine))  # the BIOS has read it
        (machine / "state").write_text("pause\n")
        assert process.stderr is not None
        assert "it stands: interrupted rip=0x7c0" in process.stderr.readline()
        (machine / "debug").write_text("1\n")
        for _ in range(3):
            assert (machine / "vm_run").read_text().startswith("debug cause=step ")
        (machine / "debug").write_text("0\n")
        (machine / "state").write_text("run\n")
        wait_for(lambda: (machine / "state").read_text() == "running\n")
        with open(machine / "mem", "r+b", buffering=0) as memory:
            if "memory_served_by passthrough\n" not in (machine / "stat").read_text():
                (machine / "state").write_text("pause\n")
            os.pwrite(memory.fileno(), b"\x01", 0x7E02)
        if (machine / "state").read_text() == "paused\n":
            (machine / "state").write_text("run\n")
        assert process.wait(BOOT_SECONDS) == 3
        rest = process.stderr.read()
        assert "vmfs boot: shutdown cause=debug-exit code=3 " in rest and "cause=step" not in rest
    finally:
        process.kill()
        process.wait()


def counted(machine: Path) -> bool:
    with open(machine / "mem", "rb", buffering=0) as memory:
        return any(os.pread(memory.fileno(), 2, 0x7E00))


def wait_for(condition) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_gdb_and_vmfs_boot_with_two_commands(pc_mount, tmp_path):
    """`vmfs boot --gdb --paused --symbols ELF --break SYMBOL`, and the gdb that it names."""
    source = ".intel_syntax noprefix; .code16; _start: mov ax, 1; nop; here: mov bx, 2; mov al, 1; out 0xf4, al\n"
    elf, unlinked, flat = (tmp_path / name for name in ("system.elf", "system.o", "system.bin"))
    subprocess.run(["as", "--64", "-o", unlinked], input=source, text=True, check=True)
    subprocess.run(["ld", "-Ttext=0x7c00", "-e", "0x7c00", "-o", elf, unlinked], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", elf, flat], check=True)
    (tmp_path / "sector").write_bytes(sector(flat.read_bytes()))
    command = boot_command(
        pc_mount, tmp_path / "sector", "--symbols", tmp_path / "system.elf", "--break", "here", "--paused", "--gdb", "0"
    )
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith(f"vmfs boot: gdb {tmp_path}/system.elf -ex 'target remote 127.0.0.1:"), said
        assert "it waits for `continue` in gdb" in process.stderr.readline()
        target = re.search(r"target remote \S+(?=')", said)[0]
        script = [target, "continue", "p/x $pc", "continue"]
        done = subprocess.run(
            ["gdb", "-nx", "-batch", tmp_path / "system.elf", *(f"-ex={line}" for line in script)],
            capture_output=True, text=True, timeout=BOOT_SECONDS, check=False,
        )  # fmt: skip
        assert "= 0x7c04\n" in done.stdout, done.stdout + done.stderr
        assert process.wait(BOOT_SECONDS) == 3
        rest = process.stderr.read()
        assert "it stands: debug cause=breakpoint id=1 " in rest and "shutdown cause=debug-exit code=3" in rest
    finally:
        process.kill()
        process.wait()


def test_vmfs_boot_says_what_is_wrong_with_its_arguments(pc_mount, tmp_path):
    (tmp_path / "sector").write_bytes(sector(SLEEP))
    for arguments, sentence in (
        (("--gdb", tmp_path / "sector"), "is no port: write FILE before --gdb"),
        ((tmp_path / "sector", "--break", "nowhere"), "--break nowhere: line 1: "),
        ((tmp_path / "sector", "--break", "main"), "known; `--symbols FILE` tells of some: a System.map or a vmlinux"),
        ((tmp_path / "sector", "--symbols", tmp_path / "sector"), "symbols: "),
        ((tmp_path / "sector", "--symbols", tmp_path / "none"), "none: No such file"),
        ((tmp_path / "sector", "--timeout", "soon"), "'soon' is not a number with ns, us, ms, s, m or h"),
    ):
        done = subprocess.run(boot_command(pc_mount, *arguments), capture_output=True, text=True, timeout=BOOT_SECONDS)
        assert done.returncode in (1, 2) and sentence in done.stderr, done.stderr


@needs("grub-mkrescue", "xorriso", "mformat", GRUB, SEABIOS)
@pytest.mark.parametrize("as_disk", [False, True])
def test_vmfs_boot_of_an_iso(pc_mount, tmp_path, as_disk):
    """A CD by itself with the host's SeaBIOS, and as a disk: the first in the order in which the BIOS tries them."""
    image = grub_iso(tmp_path / "grub.iso", ON_SERIAL + "cat /word\nhalt\n", {"word": b"from the CD"})
    (tmp_path / "other").write_bytes(sector(b"\xb0\x07\xe6\xf4"))
    arguments = (f"{image}:ro",) if as_disk else (image, "--disk", f"{tmp_path}/other:ro")
    if as_disk:
        with open(image, "r+b") as file:  # a disk by its MBR: no boot record any more
            file.seek(17 * 2048 + 7)
            file.write(b"NO TORITO")
    done = subprocess.run(
        boot_command(pc_mount, *arguments, "--timeout", "60s"),
        capture_output=True, text=True, timeout=BOOT_SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "from the CD" in done.stdout, done.stdout + done.stderr
    assert "shutdown cause=poweroff" in done.stderr and done.returncode == 0


@needs(SEABIOS)
def test_vmfs_boot_of_a_disk_alone_has_a_bios(pc_mount, tmp_path):
    (tmp_path / "disk").write_bytes(sector(b"\xb0\x07\xe6\xf4") + bytes(512))
    done = subprocess.run(
        boot_command(pc_mount, "--disk", f"{tmp_path}/disk:ro"), capture_output=True, text=True, timeout=BOOT_SECONDS,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 15, done.stderr


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"nothing " * 100, (), "nothing in it says what it is"),
        (b"", (), "it is empty"),
        (sector(SLEEP), ("--initrd", "FILE"), "--initrd is for a kernel"),
        (sector(SLEEP), ("--disk", "/nosuch"), "vmfs boot: --disk: /nosuch: No such file or directory\n"),
        (sector(SLEEP), ("--share", "/nosuch"), "vmfs boot: --share: /nosuch: No such file or directory\n"),
        (sector(SLEEP), ("--dev", "nosuch"), "vmfs boot: --dev: there is no 'nosuch': `blk "),
    ],
)
def test_vmfs_boot_says_what_it_cannot_tell(pc_mount, tmp_path, content, options, words):
    (tmp_path / "file").write_bytes(content)
    options = [str(tmp_path / "file") if word == "FILE" else word for word in options]
    before = set(os.listdir(pc_mount))
    done = subprocess.run(
        boot_command(pc_mount, tmp_path / "file", *options), capture_output=True, text=True, timeout=BOOT_SECONDS
    )
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert set(os.listdir(pc_mount)) == before


@needs("qemu-img", "xz", "zstd", SEABIOS)
@pytest.mark.parametrize("kind", ["floppy", "backing", "vmdk", "vhdx", "vdi", "xz", "zstd", "qcow2.gz"])
def test_vmfs_boot_of_an_image_of_each_kind(pc_mount, tmp_path, kind):
    """A floppy's BIOS number is 0, a disk's 80h: the code of the end tells what it was taken for."""
    raw, image = tmp_path / "raw", tmp_path / "image"
    size = 1440 << 10 if kind == "floppy" else 1 << 20
    raw.write_bytes(sector(b"\x88\xd0\x24\x80\x34\x07\xe6\xf4").ljust(size, b"\0"))  # mov al, dl; and 80h; xor 7
    form, _, packed = kind.partition(".")
    if form == "floppy":
        image = raw
    elif form == "backing":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", image], check=True)
    elif form in ("xz", "zstd"):
        packed, image = form, raw
    else:
        subprocess.run(["qemu-img", "convert", "-O", form, raw, image], check=True)
    if packed:
        with open(tmp_path / "packed", "wb") as file:
            subprocess.run([{"gz": "gzip"}.get(packed, packed), "-c", image], stdout=file, check=True)
        image = tmp_path / "packed"
    before = image.read_bytes()
    if form == "backing":
        done = boot(pc_mount, image)
        assert done.returncode == 1 and "(`vmfs boot --format qcow2`)" in done.stderr, done.stderr
    done = boot(pc_mount, image, *(("--format", "qcow2") if form == "backing" else ()))
    assert done.returncode == (15 if kind == "floppy" else (0x87 << 1 | 1) & 0xFF), done.stderr
    assert image.read_bytes() == before


def boot(mount, *arguments):
    return subprocess.run(
        boot_command(mount, *arguments), capture_output=True, text=True, timeout=BOOT_SECONDS, stdin=subprocess.DEVNULL
    )


@needs(SEABIOS)
@pytest.mark.parametrize(("machine", "bridge"), [("pc", 0x37), ("strict", 0x37), ("q35", 0xC0)])
def test_vmfs_boot_of_each_machine(pc_mount, tmp_path, machine, bridge):
    """Its disk and its CD are where it has a controller; the guest ends with a byte of the host bridge's device ID."""
    read = b"\x66\xb8\0\0\0\x80\xba\xf8\x0c\x66\xef\xba\xfe\x0c\xec\xe6\xf4"  # CF8h = 80000000h; al = CFEh; F4h = al
    (tmp_path / "disk").write_bytes(sector(read).ljust(1 << 20, b"\0"))
    (tmp_path / "cd").write_bytes(bytes(1 << 20))
    done = boot(pc_mount, tmp_path / "disk", "--machine", machine, "--cdrom", tmp_path / "cd")
    assert done.returncode == (bridge << 1 | 1) & 0xFF, done.stderr


# Writes "w" to the first disk's first sector by the BIOS, and "done" to COM1.
WRITES = f"""
    mov ax, 0x0301
    mov cx, 1
    mov dx, 0x80
    xor bx, bx
    mov es, bx
    mov bx, {0x7C00 - asm.ORIGIN} + here
    int 0x13
    mov al, 0x64
    mov dx, 0x3f8
    out dx, al
    mov al, 3
    out 0xf4, al
here:
"""


@needs(SEABIOS)
@pytest.mark.parametrize("option", ["FILE", "FILE:rw", "--disk"])
def test_what_a_snapshot_writes_is_forgotten(pc_mount, tmp_path, option):
    disk = tmp_path / "disk"
    content = sector(asm.assemble(WRITES, "real").code) + bytes(128 << 10)
    arguments = ("--disk", disk) if option == "--disk" else (f"{disk}{option[4:]}",)
    disk.write_bytes(content)
    done = boot(pc_mount, *arguments, "--snapshot", "--log", tmp_path / "log")
    assert (done.returncode, done.stdout) == (7, "d"), done.stderr
    assert disk.read_bytes() == content and (tmp_path / "log").read_bytes() == b"d"
    assert boot(pc_mount, *arguments).returncode == 7
    assert disk.read_bytes()[:510] != content[:510]  # without it, it is written


def test_the_end_as_json(pc_mount, tmp_path):
    (tmp_path / "sector").write_bytes(sector(b"\xb0\x61\xba\xf8\x03\xee\xb0\x02\xe6\xf4"))  # "a" to COM1
    done = boot(pc_mount, tmp_path / "sector", "--json")
    said = json.loads(done.stdout)
    assert said.pop("seconds") > 0 and done.returncode == 5
    assert said == {"ended": "exit", "exit": said["exit"], "code": 5}
    assert said["exit"].startswith("shutdown cause=debug-exit code=5 ") and done.stderr.startswith("a")
    (tmp_path / "sector").write_bytes(sector(b"\xeb\xfe"))
    done = boot(pc_mount, tmp_path / "sector", "--json", "--timeout", "300ms")
    assert json.loads(done.stdout)["ended"] == "timeout" and done.returncode == 8
    done = boot(pc_mount, tmp_path / "none", "--json")
    said = json.loads(done.stdout)
    assert (said["ended"], said["error"]) == ("error", f"{tmp_path}/none: No such file or directory")
    done = boot(pc_mount, tmp_path / "sector", "--json", "--log", tmp_path)
    assert json.loads(done.stdout)["error"] == f"--log {tmp_path}: Is a directory" and done.returncode == 1


@needs_kernels
def test_a_folder_is_linux_root(pc_mount, tmp_path):
    """The initramfs mounts what the command line says, and goes on there, as Debian's does."""
    root, beside = tmp_path / "root", tmp_path / "beside"
    for name in ("bin", "proc", "dev", "mnt"):
        (root / name).mkdir(parents=True)
    beside.mkdir()
    shutil.copy(BUSYBOX, root / "bin/busybox")
    init = root / "init"
    init.write_text(
        "#!/bin/busybox sh\nexport PATH=/bin\nb=/bin/busybox\n$b mount -t proc proc /proc\n"
        "$b cat /proc/mounts > /seen\n$b mount -t 9p -o trans=virtio,version=9p2000.L share0 /mnt\n"
        "$b echo from the guest > /mnt/word\n$b poweroff -f\n"
    )
    init.chmod(0o755)
    hands_over = (
        "read -r line < /proc/cmdline\nfor word in $line; do export \"$word\"; done\nmkdir /new\n"
        "mount -t $rootfstype -o $rootflags $root /new\nexec switch_root /new /init\n"
    )
    initrd = tmp_path / "initrd"
    initrd.write_bytes(build(hands_over, kernel=GENERIC, modules=("virtio_pci", "9pnet_virtio", "9p")))
    arguments = ("--initrd", initrd, "--root", root, "--share", beside, "--cmdline", "console=ttyS0 panic=-1 quiet")
    done = boot(pc_mount, GENERIC.image, *arguments, "--timeout", f"{BOOT_SECONDS - 5}s", "--json")
    assert json.loads(done.stdout)["code"] == 0, done.stderr
    assert (root / "seen").read_text().startswith("root / 9p rw,")
    assert (beside / "word").read_text() == "from the guest\n"
