"""Disk images of any size, as SeaBIOS boots them: a virtio disk, int 13h, the sector at 0000:7C00."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

# The larger one knows NVMe and xHCI.
SEABIOS, LARGER = (Path(f"/usr/share/seabios/{name}.bin") for name in ("bios", "bios-256k"))
pytestmark = pytest.mark.skipif(not SEABIOS.exists(), reason=f"{SEABIOS} is not there: Debian's package seabios")

# mov ax, 0e41h; int 10h; mov dx, 3f8h; out dx, al; hlt
PRINTS_A = bytes.fromhex("b8 41 0e cd 10 ba f8 03 ee f4").ljust(510, b"\0") + b"\x55\xaa"

# Reads the last sector, COUNT of them into 0000:8000, with the geometry that int 13h, AH=8 tells; sends its first byte.
LAST_SECTOR = 26
READS_ITS_END = (
    bytes.fromhex(f"31c0 8ed8 8ec0 bb0080 b80102 b9{LAST_SECTOR:02x}00 30f6 cd13 7307 b045 baf803 ee f4"
                  "a00080 baf803 ee f4").ljust(510, b"\0") + b"\x55\xaa"
)  # fmt: skip


def boot(pc, image: Path, mode: str, kind: str = "blk") -> None:
    pc.write("mem_size", "16M")
    pc.load("bios", LARGER if kind in ("nvme", "usb-disk") else SEABIOS)
    pc.write("dev/add", f"{kind} {image} {mode}")
    pc.start()


@pytest.mark.parametrize(
    "size, mode, kind",
    [(512, "rw", "blk"), (512, "ro", "blk"), (512, "cow", "blk"), (13_188, "ro", "blk"), (13_188, "cow", "blk"),
     (64 * 512, "rw", "blk"), (2 << 20, "rw", "blk"), (2 << 20, "rw", "ahci"), (2 << 20, "rw", "nvme"),
     (2 << 20, "rw", "usb-disk")],
)  # fmt: skip
def test_a_boot_sector_on_a_disk_of_any_size(make_pc, tmp_path, size, mode, kind):
    image = tmp_path / "disk.img"
    image.write_bytes(PRINTS_A.ljust(size, b"\0"))
    pc = make_pc()
    boot(pc, image, mode, kind)
    pc.expect("A")
    deadline = time.monotonic() + 30
    while "A" not in (shown := pc.read("screen.txt")).splitlines():
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)


def test_the_end_of_a_disk_whose_last_sector_is_cut(make_pc, tmp_path):
    """13,188 bytes are 25 sectors and 388 bytes: the 26th is there, with zeros at its end."""
    image = tmp_path / "disk.img"
    image.write_bytes(READS_ITS_END.ljust(25 * 512, b"\0") + b"Z" * 388)
    pc = make_pc()
    boot(pc, image, "cow")
    assert pc.expect("[ZE]")[0] == "Z"


def test_a_disk_to_be_written_is_not_padded(make_pc, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(PRINTS_A.ljust(13_188, b"\0"))
    pc = make_pc()
    with pytest.raises(OSError) as caught:
        pc.write("dev/add", f"blk {image} rw")
    assert caught.value.errno == 22
    error = pc.read("error")
    assert "13188" in error and "truncate -s %512" in error and "cow" in error
    assert image.stat().st_size == 13_188
