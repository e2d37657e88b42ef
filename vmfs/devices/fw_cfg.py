"""fw_cfg: files that firmware reads, and numbers by which it knows the machine; QEMU's interface, which SeaBIOS speaks.

A 16-bit selector at port 510, bytes at 511, and reads by DMA at 514. What was selected can be read only.

Source: QEMU's docs/specs/fw_cfg.rst; keys as Linux include/uapi/linux/qemu_fw_cfg.h and SeaBIOS src/fw/paravirt.h
name them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec

from vmfs.devices.device import U16, U64, DeviceState, Port, QuietDevice, Window
from vmfs.words.errors import Invalid

PORT, PORTS = 0x510, 12
_SELECTOR, _DATA, _DMA_HIGH, _DMA_LOW = 0, 1, 4, 8  # offsets

SIGNATURE, ID, UUID, RAM_SIZE, NO_GRAPHIC, CPUS, NUMA, BOOT_MENU, MOST_CPUS, DIRECTORY, FIRST_FILE = (
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x0D, 0x0E, 0x0F, 0x19, 0x20,
)  # fmt: skip
_IMAGES = {"kernel": (0x08, 0x11), "initrd": (0x0B, 0x12)}  # size and data
_CMDLINE = 0x14, 0x15  # with its NUL
_SIZE = struct.Struct("<I")
IRQ0_OVERRIDE = 0x8002  # IRQ 0 is GSI 2, as on every PC with an IOAPIC
_HAS_DMA = 2

_DMA = struct.Struct(">IIQ")  # control, length, address
_ERROR, _READ, _SKIP, _SELECT, _WRITE = 1, 2, 4, 8, 16
DMA_MOST = 64 << 20  # bytes of one transfer
NAME_MOST = 55
_FILE = struct.Struct(">IHH56s")


class FwCfgState(DeviceState):
    """`offers_kernel`: the machine's `kernel`, `initrd` and `cmdline` are among its items."""

    key: U16
    offset: U64
    address: U64
    files: dict[Annotated[str, msgspec.Meta(max_length=NAME_MOST)], bytes]
    offers_kernel: bool = False


class Image(Protocol):
    """An item that is not held here."""

    @property
    def size(self) -> int: ...
    def read_at(self, offset: int, length: int) -> bytes: ...


class FwCfg(QuietDevice[FwCfgState]):
    """`files` are by their names, which firmware looks up in the directory."""

    TYPE = "fw-cfg"
    STATE = FwCfgState

    def __init__(self, board: Port, name: str) -> None:
        super().__init__(board, name)
        self.files: dict[str, bytes] = {}
        self.offers_kernel = False
        self._items: dict[int, bytes | Image] = {}
        self.reset()

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", PORT, PORTS),)

    def reset(self) -> None:
        self.key = self.offset = 0
        self.address = 0  # of the DMA descriptor
        self._make_items()

    def set_files(self, files: Mapping[str, bytes], *, offers_kernel: bool = False) -> None:
        """Have these in place of those before. Invalid for a name that is too long. `offers_kernel`: firmware is to
        load what the machine's user wants to boot."""
        _check_names(files)
        self.files, self.offers_kernel = dict(files), offers_kernel
        self._make_items()

    def set_file(self, name: str, data: bytes) -> None:
        """Have other contents in one."""
        self.files[name] = data
        self._make_items()

    def _make_items(self) -> None:
        directory = struct.pack(">I", len(self.files))
        for key, name in enumerate(sorted(self.files), FIRST_FILE):
            directory += _FILE.pack(len(self.files[name]), key, 0, name.encode())
        self._items = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", 1 | _HAS_DMA),
            UUID: self.board.uuid,
            RAM_SIZE: struct.pack("<Q", self.board.ram_size),
            NO_GRAPHIC: bytes(2),
            CPUS: struct.pack("<H", self.board.cpu_count),
            NUMA: bytes(16),
            BOOT_MENU: bytes(2),  # SeaBIOS does not wait for a key
            MOST_CPUS: struct.pack("<H", self.board.cpu_count),
            DIRECTORY: directory,
            IRQ0_OVERRIDE: b"\x01",
            **dict(enumerate((self.files[name] for name in sorted(self.files)), FIRST_FILE)),
            **(self._kernel() if self.offers_kernel else {}),
        }

    def _kernel(self) -> dict[int, bytes | Image]:
        """The items by which firmware loads it: a Linux kernel with its stub, or another program for UEFI."""
        images = self.board.images
        if images is None:
            return {}
        kept, items = images.keep(), {}
        for name, (size, data) in _IMAGES.items():
            if name in kept:
                items |= {size: _SIZE.pack(kept[name].size), data: kept[name]}
        line = images.cmdline.encode(errors="surrogateescape") + b"\0"
        return {**items, _CMDLINE[0]: _SIZE.pack(len(line)), _CMDLINE[1]: line}

    def _length(self) -> int:
        item = self._items.get(self.key, b"")
        return len(item) if isinstance(item, bytes) else item.size

    # ---- ports

    def read(self, region: int, offset: int, size: int) -> int:
        if offset == _DATA:
            return int.from_bytes(self._take(size), "little")
        if _DMA_HIGH <= offset:  # the two ports read as a signature
            return int.from_bytes(b"QEMU CFG"[offset - _DMA_HIGH :][:size].ljust(size, b"\0"), "little")
        return 0

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if offset == _SELECTOR and size == 2:
            self._select(value)
        elif offset in (_DMA_HIGH, _DMA_LOW) and size == 4:
            value = int.from_bytes(value.to_bytes(4, "little"), "big")
            if offset == _DMA_HIGH:
                self.address = value << 32
            else:
                address, self.address = self.address | value, 0
                self._transfer(address)

    def _select(self, key: int) -> None:
        self.key, self.offset = key, 0
        self.counters["selected"] += 1

    def _take(self, length: int) -> bytes:
        """What comes next of the item; zeros after its end."""
        item = self._items.get(self.key, b"")
        if isinstance(item, bytes):
            data = item[self.offset : self.offset + length]
        else:
            data = item.read_at(self.offset, min(length, item.size - self.offset))
        self.offset = min(self.offset + length, self._length())
        return data.ljust(length, b"\0")

    def _transfer(self, address: int) -> None:
        """Do what the descriptor in RAM says, and say there how it went: 0, or the error bit."""
        try:
            control, length, target = _DMA.unpack(self.board.dma_read(address, _DMA.size))
        except Invalid:
            self.counters["bad_dma"] += 1
            return
        if control & _SELECT:
            self._select(control >> 16)
        result = 0
        if control & _READ:
            try:
                if length > DMA_MOST:
                    raise Invalid(f"fw_cfg: a transfer of {length} bytes")
                self.board.dma_write(target, self._take(length))
            except Invalid:
                self.counters["bad_dma"] += 1
                result = _ERROR
        elif control & _WRITE:
            result = _ERROR  # all of it is read-only
        elif control & _SKIP:
            self.offset = min(self.offset + length, self._length())
        self.board.dma_write(address, struct.pack(">I", result))

    # ---- state

    def describe(self) -> dict[str, str]:
        return {"files": " ".join(sorted(self.files)) or "none"}

    def save(self) -> FwCfgState:
        return FwCfgState(
            offers_kernel=self.offers_kernel,
            key=self.key,
            offset=self.offset,
            address=self.address,
            files=dict(self.files),
        )

    def check(self, state: FwCfgState) -> None:
        _check_names(state.files)

    def load(self, state: FwCfgState) -> None:
        self.set_files(state.files, offers_kernel=state.offers_kernel)
        self.key, self.address = state.key, state.address
        self.offset = min(state.offset, self._length())


def _check_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if len(name.encode(errors="surrogatepass")) > NAME_MOST:
            raise Invalid(f"fw_cfg: the name {name[:40]!r} is longer than {NAME_MOST} bytes")
