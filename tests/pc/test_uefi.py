"""OVMF from flash: its shell and its variables, systemd-boot, and Debian's signed chain with Secure Boot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pc.conftest import BOOT_SECONDS
from pc.initramfs import build
from pc.kernels import CLOUD, EFI, needs_kernels
from pc.media import esp, needs

CODE, VARS = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
GUID = "12345678-1234-1234-1234-123456789abc"
pytestmark = [needs_kernels, needs(CODE, VARS, EFI / "shimx64.efi", "mformat")]
LINUX = {"vmlinuz": CLOUD.image}
COMMAND_LINE = "console=ttyS0 quiet panic=-1"
# What Linux says of the firmware, on the console.
INIT = f"""
echo dmi=$(cat /sys/class/dmi/id/sys_vendor) uuid=$(cat /sys/class/dmi/id/product_uuid)
dmesg | grep -E -o 'secureboot: .*|Kernel is locked down from .*'
mount -t efivarfs efi /sys/firmware/efi/efivars
echo value=$(tail -c 4 /sys/firmware/efi/efivars/VmfsTest-{GUID})
poweroff -f
"""


@pytest.fixture(scope="module")
def initrd() -> bytes:
    return build(INIT, modules=("efivarfs",))


def boot(mount, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmfs.cli", "boot", "--on", str(mount), "--mem", "256M", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOOT_SECONDS, stdin=subprocess.DEVNULL)


def test_the_shell_runs_a_script_and_systemd_boot(pc_mount, tmp_path, initrd):
    """The script sets a variable, which is in the user's file afterwards, and goes on with systemd-boot, whose Linux
    reads it."""
    script = f"""@echo -off
echo SCRIPT-RUNS
smbiosview -t 1
setvar VmfsTest -guid {GUID} -bs -rt -nv ="Wxyz"
fs0:\\systemd-bootx64.efi
"""
    entry = f"title Debian\nlinux /vmlinuz\ninitrd /initrd\noptions {COMMAND_LINE}\n"
    disk = esp(tmp_path / "disk", {
        **LINUX, "initrd": initrd, "startup.nsh": script.encode(), "systemd-bootx64.efi": EFI / "systemd-bootx64.efi",
        "loader/loader.conf": b"timeout 0\ndefault debian\n", "loader/entries/debian.conf": entry.encode(),
    }, size=48 << 20)  # fmt: skip
    variables = tmp_path / "variables"
    done = boot(pc_mount, "--uefi", "--uefi-vars", variables, f"{disk}:cow")
    assert done.returncode == 0 and "SCRIPT-RUNS" in done.stdout, done.stdout[-3000:] + done.stderr
    assert "Manufacturer: vmfs" in done.stdout
    assert "dmi=vmfs" in done.stdout and "value=Wxyz" in done.stdout, done.stdout[-3000:]
    assert "secureboot: Secure boot disabled" in done.stdout
    kept = variables.read_bytes()
    assert "VmfsTest".encode("utf-16-le") in kept and len(kept) == VARS.stat().st_size
    assert "VmfsTest".encode("utf-16-le") not in VARS.read_bytes()


def test_debians_signed_chain_starts_with_secure_boot(pc_mount, tmp_path, initrd):
    config = f"linux /vmlinuz {COMMAND_LINE}\ninitrd /initrd\nboot\n"
    disk = esp(tmp_path / "disk", {
        **LINUX, "initrd": initrd, "EFI/debian/grub.cfg": config.encode(),
        "EFI/BOOT/BOOTX64.EFI": EFI / "shimx64.efi", "EFI/BOOT/grubx64.efi": EFI / "grubx64.efi",
    }, size=48 << 20)  # fmt: skip
    done = boot(pc_mount, "--secure-boot", f"{disk}:cow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "secureboot: Secure boot enabled" in done.stdout, done.stdout[-3000:]
    assert "Kernel is locked down from EFI Secure Boot" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (("--uefi", "--bios", "/usr/share/seabios/bios.bin"), "a machine begins with one of both"),
    (("--uefi", "/usr/share/seabios/bios.bin"), "a BIOS, and --uefi is another"),
    (("--uefi", sys.executable), "a kernel without an EFI stub"),
    (("--uefi", "--uefi-vars", "/nowhere/vars"), "/nowhere/vars: No such file or directory"),
])  # fmt: skip
def test_what_uefi_cannot_boot_is_said(pc_mount, arguments, words):
    before = set(os.listdir(pc_mount))
    done = boot(pc_mount, *arguments)
    assert done.returncode and words in done.stderr and set(os.listdir(pc_mount)) == before
