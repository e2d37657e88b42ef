"""A PC around the emulator for SeaBIOS: what its ports need, and no more.

RAM, the firmware at the top of 4 GiB and its copy below 1 MiB, the interrupt controllers of the machine, CMOS
memory, the debug port 0x402, an ATA disk without interrupts, and nothing at the other ports (they read as all
ones). Without a PCI host bridge nobody can open the shadow RAM, so it is open from the start and holds the
whole image, as a bridge would leave it.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from vmfs.engine.emulator.engine import EmulatorEngine
from vmfs.words import exits

IMAGES = Path("/usr/share/seabios")
RAM = 16 << 20
FOUR_GIB = 1 << 32
SECTOR = 512
# ATA status bits (ATA/ATAPI-6, 7.15)
READY, DATA_REQUEST, FAILED = 0x40, 0x08, 0x01


class AtaDisk:
    """One disk at 0x1f0 and 0x3f6: IDENTIFY DEVICE and READ SECTORS by programmed input (ATA/ATAPI-6)."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.file = bytearray(8)  # features, count, LBA low, mid, high, device at 1 to 6
        self.status, self.buffer = READY, b""
        self.reset()

    def reset(self) -> None:
        self.file[2:7] = bytes((1, 1, 0, 0, 0))  # the signature of a disk
        self.status, self.buffer = READY, b""

    def write(self, register: int, value: int) -> None:
        if register < 7:
            self.file[register] = value
        elif self.file[6] & 0x10:  # device 1 is not there
            return
        elif value == 0xEC:
            self.serve(self.identity())
        elif value == 0x20:
            lba = int.from_bytes(self.file[3:6], "little") | (self.file[6] & 15) << 24
            self.serve(self.image[lba * SECTOR : (lba + (self.file[2] or 256)) * SECTOR])
        else:
            self.status = READY | FAILED

    def serve(self, data: bytes) -> None:
        self.status, self.buffer = READY | DATA_REQUEST, data

    def read(self, register: int, size: int) -> bytes:
        if register == 0:
            data, self.buffer = self.buffer[:size], self.buffer[size:]
            if not self.buffer:
                self.status = READY
            return data.ljust(size, b"\xff")
        if self.file[6] & 0x10:
            return bytes(size)
        return bytes([self.status if register == 7 else self.file[register]]) * size

    def identity(self) -> bytes:
        words = [0] * 256
        words[0], words[1], words[3], words[6] = 0x0040, 2, 16, 63  # fixed disk; cylinders, heads, sectors
        words[27:47] = struct.unpack(">20H", b"A DISK OF A TEST".ljust(40))  # first character high
        words[49] = 0x0200  # LBA
        words[60] = len(self.image) // SECTOR
        return struct.pack("<256H", *words)


class Pc:
    """`image` is SeaBIOS; `disk` the contents of the disk, or None."""

    def __init__(self, image: bytes, disk: bytes | None = None) -> None:
        self.machine = EmulatorEngine().create_machine()
        self.machine.create_irqchip()
        fd, rom = os.memfd_create("ram"), os.memfd_create("rom")
        os.ftruncate(fd, RAM)
        os.write(rom, image)
        self.ram = mmap.mmap(fd, RAM)
        self.ram[0x100000 - len(image) : 0x100000] = image
        self.machine.map_memory(0, 0, fd, 0, 0xA0000)
        self.machine.map_memory(1, 0xC0000, fd, 0xC0000, RAM - 0xC0000)
        self.machine.map_memory(2, FOUR_GIB - len(image), rom, 0, len(image), read_only=True)
        os.close(fd)
        os.close(rom)
        self.cpu = self.machine.create_vcpu(0)
        self.disk = AtaDisk(disk) if disk else None
        self.cmos, self.cmos_index = bytearray(128), 0
        self.cmos[0x30:0x32] = struct.pack("<H", (RAM >> 10) - 1024)  # KiB above 1 MiB
        self.cmos[0x0D] = 0x80  # the battery is good
        self.printed = bytearray()

    @property
    def instructions(self) -> int:
        return self.cpu.counters()["instructions"]

    def run(self, until: bytes, budget: int) -> exits.Exit | None:
        """Until `until` was printed: None. Else the exit that nobody here serves, or that of the budget."""
        while until not in self.printed:
            left = budget - self.instructions
            exit_ = self.cpu.run(left) if left > 0 else exits.Limit(rip=0, cpu=0)
            if isinstance(exit_, exits.Io) and exit_.direction == "out":
                self.out(exit_.port, exit_.data)
            elif isinstance(exit_, exits.Io):
                self.cpu.access_data = self.input(exit_.port, exit_.size, exit_.size * exit_.count)
            elif not isinstance(exit_, exits.Mmio):
                return exit_
        return None

    def out(self, port: int, data: bytes) -> None:
        if port == 0x402:
            self.printed += data
        elif port == 0x70:
            self.cmos_index = data[0] & 127
        elif port == 0x71:
            self.cmos[self.cmos_index] = data[0]
        elif self.disk and 0x1F0 <= port < 0x1F8:
            self.disk.write(port - 0x1F0, data[0])
        elif self.disk and port == 0x3F6 and data[0] & 4:
            self.disk.reset()

    def input(self, port: int, size: int, total: int) -> bytes:
        if port == 0x402:
            return b"\xe9" * total  # the debug port is there
        if port == 0x71:
            return bytes([self.cmos[self.cmos_index]]) * total
        if port == 0x511:
            return bytes(total)  # no signature of fw_cfg
        if self.disk and 0x1F0 <= port < 0x1F8:
            return self.disk.read(port - 0x1F0, total)
        if self.disk and port == 0x3F6:
            return self.disk.read(7, total)
        return b"\xff" * total

    def close(self) -> None:
        self.machine.close()
