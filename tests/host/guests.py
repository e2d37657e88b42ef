"""A guest that uses a device, small enough to be read."""

from __future__ import annotations

from pathlib import Path

from mounting import Machine

SEABIOS = Path("/usr/share/seabios/bios.bin")


def writes_sector(data: bytes) -> bytes:
    """A boot sector whose guest writes `data` (3 bytes) to the beginning of its disk's second one, by int 13h."""
    assert len(data) == 3
    low, high = data[:2].hex(), data[2:].hex()
    code = bytes.fromhex(
        "31c0 8ed8 8ec0 bb0080"  # xor ax, ax; mov ds, ax; mov es, ax; mov bx, 8000h
        f"c707{low} c64702{high}"  # mov word [bx], low; mov byte [bx + 2], high
        "b80103 b90200 30f6 cd13"  # mov ax, 301h; mov cx, 2; xor dh, dh; int 13h (dl is the disk)
        "0f92c0 e6f4 f4"  # setc al; out 0xf4, al: whether it failed
    )
    return code.ljust(510, b"\0") + b"\x55\xaa"


def boot_disk(vm: Machine, disk: Path, mode: str = "rw") -> str:
    """How the run of that sector ended: `code=1` where it wrote, `code=3` where that failed."""
    vm.write("machine", "pc")
    vm.write("mem_size", "16M")
    (vm / "bios").write_bytes(SEABIOS.read_bytes())
    vm.write("dev/add", f"blk {disk} {mode}")
    return vm.run()
