"""Each storage device under a Debian's kernel, by `vmfs boot` (`make storage`).

Blocks that four processes write and read at the same time are compared with what was written last (verify.c). Then the
disk is partitioned, gets a file system, and is the root file system, which the host checks afterwards. A CD is a root
file system, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from pc.initramfs import build
from pc.kernels import BUSYBOX, FOLDER, GENERIC

from vmfs.client.mounting import private_mount

MIB = 1 << 20
SIZE = 64 * MIB
# The line of dev/add, the disk in Linux, its driver's modules.
DEVICES = {
    "ide": ("ide {} rw", "/dev/sda", ("ata_piix", "sd_mod")),
    "ahci": ("ahci {} rw", "/dev/sda", ("ahci", "sd_mod")),
    "nvme": ("nvme {} rw", "/dev/nvme0n1", ("nvme",)),
    "usb": ("usb-disk {} rw", "/dev/sda", ("xhci_pci", "usb_storage", "sd_mod")),
    "virtio": ("blk {} rw", "/dev/vda", ("virtio_pci", "virtio_blk")),
    "cd": ("cdrom {}", "/dev/sr0", ("ata_piix", "sr_mod")),
    "ahci-cd": ("ahci-cdrom {}", "/dev/sr0", ("ahci", "sr_mod")),
}
AWAIT = "n=0; until [ -b {0} ] || [ $n = 300 ]; do sleep 0.1; n=$((n+1)); done\n"
DISK = """
/verify {disk} {seconds} && echo "verified."
printf 'n\\np\\n1\\n\\n\\nw\\n' | fdisk {disk} >/tmp/said 2>&1 || cat /tmp/said
p=$(ls {disk}*1 | tail -n 1)
mke2fs $p >/tmp/said 2>&1 || cat /tmp/said
mount -t ext4 $p /mnt || poweroff -f
mkdir /mnt/bin /mnt/proc /mnt/dev
cp /bin/busybox /mnt/bin/busybox
cp /root-init /mnt/init
"""
CD = "mount -t iso9660 -o ro {disk} /mnt || poweroff -f\n"
OVER = "exec switch_root /mnt /init\n"
ROOT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep -v rootfs /proc/mounts | /bin/busybox grep ' / ' && echo "it is root."
/bin/busybox cp /bin/busybox /copy && /bin/busybox sync
echo 3 > /proc/sys/vm/drop_caches
/bin/busybox md5sum /bin/busybox /copy
/bin/busybox mount -o remount,ro /
/bin/busybox poweroff -f
"""


def program(folder: Path) -> bytes:
    made = folder / "verify"
    subprocess.run(["gcc", "-O2", "-static", "-o", made, Path(__file__).with_name("verify.c")], check=True)
    return made.read_bytes()


def make_iso(folder: Path) -> Path:
    tree, iso = folder / "tree", folder / "root.iso"
    for name in ("bin", "proc", "dev"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    (tree / "init").write_text(ROOT)
    (tree / "init").chmod(0o755)
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", iso, tree]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return iso


def wrong(name: str, mount: Path, folder: Path, seconds: int) -> str:
    """What is, of that device; nothing where all is right."""
    line, disk, modules = DEVICES[name]
    is_cd = line.endswith("cdrom {}")
    image = make_iso(folder) if is_cd else folder / "image"
    if not is_cd:
        image.write_bytes(b"")
        os.truncate(image, SIZE)
    script = AWAIT.format(disk) + (CD if is_cd else DISK).format(disk=disk, seconds=seconds) + OVER
    files = {} if is_cd else {"verify": program(folder), "root-init": ROOT.encode()}
    systems = ("isofs",) if is_cd else ("crc32c_generic", "ext4")
    initrd = folder / "initrd"
    initrd.write_bytes(build(script, kernel=GENERIC, modules=(*modules, *systems), files=files))
    command = [
        sys.executable, "-m", "vmfs.cli", "boot", GENERIC.image, "--initrd", initrd, "--engine", "emulator",
        "--cmdline", "console=ttyS0 quiet panic=-1", "--dev", line.format(image), "--timeout", "10m", "--on", mount,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    said = done.stdout + done.stderr
    sums = [one.split()[0] for one in done.stdout.splitlines() if one.endswith(("/bin/busybox", "/copy"))]
    if done.returncode or "it is root." not in said or not is_cd and ("verified." not in said or "wrong" in said):
        return said
    if not sums or len(set(sums)) != 1 or len(sums) != (1 if is_cd else 2):
        return f"the copy is another: {said}"
    return "" if is_cd else checked(image)


def checked(image: Path) -> str:
    """The file system of its first partition."""
    first = struct.unpack_from("<I", image.read_bytes()[:512], 446 + 8)[0]
    path = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    command = [shutil.which("e2fsck", path=path) or "e2fsck", "-fn", f"{image}?offset={first * 512}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if not done.returncode else done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", nargs="*", metavar="DEVICE", help=f"of {', '.join(DEVICES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=20, help="that blocks are written and read (default: 20)")
    arguments = parser.parse_args()
    if unknown := set(arguments.devices) - DEVICES.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if not (FOLDER / "stamp").exists():
        parser.error("scripts/fetch_kernels.sh has not fetched the kernels")
    failed = False
    with private_mount() as mount:
        for name in arguments.devices or DEVICES:
            with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
                found = wrong(name, mount, Path(folder), arguments.seconds)
            print(f"{name}: {'WRONG' if found else 'right'}\n{found}".rstrip(), flush=True)
            failed |= bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
