"""A driver of xHCI: command ring, event ring, slots, transfers; and commands of a USB disk."""

from __future__ import annotations

import struct

from devices.fakes import Guest

from vmfs.devices.machine import XHCI_SLOT

CONTEXTS, COMMANDS, EVENTS, TABLE, INPUT, BUFFER = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x1_4000, 0x20_0000
OUTPUTS, RINGS = 0x1_8000, 0x2_0000  # a slot's each KiB; a ring each 4 KiB, 32 a slot
RING_SIZE, EVENTS_SIZE = 32, 64
USBCMD, USBSTS, CRCR, DCBAAP, CONFIG, PORTSC = 0x40, 0x44, 0x58, 0x70, 0x78, 0x440
IMAN, ERSTSZ, ERSTBA, ERDP, DOORBELL = 0x1020, 0x1028, 0x1030, 0x1038, 0x2000
LINK, NORMAL, SETUP, DATA, STATUS = 6, 1, 2, 3, 4
SUCCESS, TRANSACTION_ERROR, TRB_ERROR, STALL, SHORT = 1, 4, 5, 6, 13
BULK_IN, BULK_OUT, INTERRUPT_IN = 3, 4, 3  # DCIs


class Ring:
    def __init__(self, ram, at):
        self.ram, self.start, self.index, self.cycle = ram, at, 0, 1
        ram[at : at + 16 * RING_SIZE] = bytes(16 * RING_SIZE)
        struct.pack_into("<QII", ram, at + 16 * (RING_SIZE - 1), at, 0, LINK << 10 | 2)

    def put(self, parameter, status, control):
        """Returns where it is."""
        at = self.start + 16 * self.index
        struct.pack_into("<QII", self.ram, at, parameter, status, control & ~1 | self.cycle)
        self.index += 1
        if self.index == RING_SIZE - 1:
            link = self.start + 16 * self.index
            (control,) = struct.unpack_from("<I", self.ram, link + 12)
            struct.pack_into("<I", self.ram, link + 12, control & ~1 | self.cycle)
            self.index, self.cycle = 0, 1 - self.cycle
        return at


class Driver(Guest):
    def __init__(self, pc):
        super().__init__(pc)
        self.begin()

    def begin(self):
        """Reset the controller and have it run."""
        self.config(XHCI_SLOT, 4, 0x106, size=2)
        self.base = self.board.xhci.bar(0)
        ram = self.board.ram
        for at, length in ((CONTEXTS, 0x1000), (EVENTS, 0x1000), (OUTPUTS, 0x4000)):
            ram[at : at + length] = bytes(length)
        self.put(USBCMD, 2)
        self.rings = {}
        self.commands = Ring(ram, COMMANDS)
        self.event, self.event_cycle = 0, 1
        struct.pack_into("<QII", ram, TABLE, EVENTS, EVENTS_SIZE, 0)
        for slot in range(1, 17):
            struct.pack_into("<Q", ram, CONTEXTS + 8 * slot, OUTPUTS + 0x400 * slot)
        self.put(CONFIG, 16)
        self.put(DCBAAP, CONTEXTS, 8)
        self.put(CRCR, COMMANDS | 1, 8)
        self.put(ERSTSZ, 1)
        self.put(ERDP, EVENTS, 8)
        self.put(ERSTBA, TABLE, 8)
        self.put(IMAN, 2)
        self.put(USBCMD, 5)

    def put(self, register, value, size=4):
        self.store(self.base + register, value, size)

    def get(self, register, size=4):
        return self.load(self.base + register, size)

    @property
    def interrupt(self):
        return self.board.machine.lines.get(16 + XHCI_SLOT % 8, False)

    def events(self):
        """Those that came, as (parameter, status, control), taken."""
        found = []
        while True:
            event = struct.unpack_from("<QII", self.board.ram, EVENTS + 16 * self.event)
            if event[2] & 1 != self.event_cycle:
                break
            found.append(event)
            self.event += 1
            if self.event == EVENTS_SIZE:
                self.event, self.event_cycle = 0, 1 - self.event_cycle
        self.put(IMAN, 3)
        self.put(ERDP, EVENTS + 16 * self.event | 8, 8)
        return found

    def command(self, kind, parameter=0, control=0):
        """Its completion code, and the slot."""
        at = self.commands.put(parameter, 0, kind << 10 | control)
        self.put(DOORBELL, 0)
        found = [event for event in self.events() if event[2] >> 10 & 63 == 33]
        assert found and found[-1][0] == at, found
        return found[-1][1] >> 24, found[-1][2] >> 24

    def input(self, drop=0, add=0, slot=(), endpoints=None):
        ram = self.board.ram
        ram[INPUT : INPUT + 33 * 32] = bytes(33 * 32)
        struct.pack_into("<II", ram, INPUT, drop, add)
        if slot:
            struct.pack_into(f"<{len(slot)}I", ram, INPUT + 32, *slot)
        for dci, (kind, size, at) in (endpoints or {}).items():
            words = 0, size << 16 | kind << 3 | 3 << 1, at | 1, 0, size
            struct.pack_into("<5I", ram, INPUT + 32 * (dci + 1), *words)

    def ring(self, slot, dci):
        self.rings[slot, dci] = Ring(self.board.ram, RINGS + 0x1000 * (32 * (slot - 1) + dci))
        return self.rings[slot, dci].start

    def address(self, port):
        """Reset a port, and give what is there an address; its slot."""
        self.put(PORTSC + 0x10 * (port - 1), 0x210)
        self.put(PORTSC + 0x10 * (port - 1), 0x200 | 0xFE0000)
        code, slot = self.command(9)
        assert code == SUCCESS
        speed = self.get(PORTSC + 0x10 * (port - 1)) >> 10 & 15
        self.input(0, 3, (1 << 27 | speed << 20, port << 16), {1: (4, 512 if speed == 4 else 8, self.ring(slot, 1))})
        assert self.command(11, INPUT, slot << 24) == (SUCCESS, slot)
        return slot

    def configure(self, slot, endpoints):
        """With endpoints by their DCI: kind and size. And the device, too."""
        add = 1 | sum(1 << dci for dci in endpoints)
        rows = {dci: (*one, self.ring(slot, dci)) for dci, one in endpoints.items()}
        self.input(0, add, (max(endpoints) << 27,), rows)
        assert self.command(12, INPUT, slot << 24) == (SUCCESS, slot)
        assert self.control(slot, 0x00, 9, 1) == (SUCCESS, b"")

    def disk(self, port=5):
        slot = self.address(port)
        self.configure(slot, {BULK_IN: (6, 1024), BULK_OUT: (2, 1024)})
        return slot

    def hid(self, port):
        slot = self.address(port)
        self.configure(slot, {INTERRUPT_IN: (7, 8)})
        return slot

    # ---- transfers

    def answer(self, slot, dci):
        """Code and residue of the transfers that have ended."""
        wanted = slot << 24 | dci << 16 | 32 << 10
        return [(status >> 24, status & 0xFFFFFF) for _, status, control in self.events() if control & ~5 == wanted]

    def control(self, slot, kind, request, value=0, index=0, length=0, data=b""):
        """Completion code and what came."""
        ring, length = self.rings[slot, 1], len(data) or length
        self.board.ram[BUFFER : BUFFER + length] = data.ljust(length, b"\0")
        (setup,) = struct.unpack("<Q", struct.pack("<BBHHH", kind, request, value, index, length))
        is_in = kind >> 7
        ring.put(setup, 8, SETUP << 10 | 0x40 | (0 if not length else 3 if is_in else 2) << 16)
        if length:
            ring.put(BUFFER, length, DATA << 10 | is_in << 16 | 4)
        ring.put(0, 0, STATUS << 10 | 0x20 | (0 if is_in and length else 1) << 16)
        self.put(DOORBELL + 4 * slot, 1)
        found = self.answer(slot, 1)
        rest = next((rest for code, rest in found if code == SHORT), 0)
        return found[-1][0], bytes(self.board.ram[BUFFER : BUFFER + length - rest]) if is_in else b""

    def transfer(self, slot, dci, *parts, rings=True, flags=0):
        """Of several parts of memory; what came of it."""
        for number, (at, length) in enumerate(parts):
            is_last = number == len(parts) - 1
            self.rings[slot, dci].put(at, length, NORMAL << 10 | 4 | flags | (0x20 if is_last else 0x10))
        if rings:
            self.put(DOORBELL + 4 * slot, dci)
        return self.answer(slot, dci)

    def recover(self, slot, dci):
        """As a driver does after a stall."""
        assert self.command(14, 0, slot << 24 | dci << 16)[0] == SUCCESS
        ring = self.rings[slot, dci]
        at = ring.start + 16 * ring.index | ring.cycle
        assert self.command(16, at, slot << 24 | dci << 16)[0] == SUCCESS
        if dci > 1:
            assert self.control(slot, 2, 1, 0, dci >> 1 | (dci & 1) << 7)[0] == SUCCESS

    # ---- of a disk

    def scsi(self, slot, block, length=0, *, to_host=True, data=b"", parts=None, unit=0, signature=b"USBC"):
        """Status and residue of a command, and the data that came."""
        ram = self.board.ram
        ram[BUFFER : BUFFER + 31] = struct.pack(
            "<4sIIBBB16s", signature, 0x77, length, 0x80 if to_host else 0, unit, len(block), block
        )
        found = self.transfer(slot, BULK_OUT, (BUFFER, 31))
        if found != [(SUCCESS, 0)]:
            return found
        if length:
            parts = parts or ((BUFFER + 0x1000, length),)
            if data:
                at = 0
                for where, size in parts:
                    ram[where : where + size] = data[at : at + size].ljust(size, b"\0")
                    at += size
            dci = BULK_IN if to_host else BULK_OUT
            found = self.transfer(slot, dci, *parts)
            if found[-1][0] == STALL:
                self.recover(slot, dci)
        assert self.transfer(slot, BULK_IN, (BUFFER + 64, 13)) == [(SUCCESS, 0)]
        signature, tag, residue, status = struct.unpack_from("<4sIIB", ram, BUFFER + 64)
        assert (signature, tag) == (b"USBS", 0x77)
        came = b"".join(bytes(ram[at : at + size]) for at, size in parts or ())[: length - residue]
        return status, residue, came if to_host else b""
