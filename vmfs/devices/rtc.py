"""MC146818 real-time clock with its CMOS RAM: the time of day, an alarm, periodic and update interrupts.

Its registers are bytes, and read back as they were written. An update makes the seconds one more and carries as far
as it goes; what is none of a field's values (month 13h) stays as it is, and nothing is carried into it or out of it.
While SET is set there are no updates. The divider goes on meanwhile: updates come at its seconds.

Nothing ticks while nobody looks: what has happened is worked out when a register is used, and the board calls only
for interrupts that are enabled. Daylight saving (DSE) and the square wave are bits that do nothing.

Source: Motorola MC146818A data sheet; the CMOS bytes are those that PC firmware uses.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec

from vmfs.devices import _chips
from vmfs.devices.device import U8, DeviceState, Port, QuietDevice, Window
from vmfs.memory.ram import Region, regions_of

INDEX, DATA, IRQ = 0x70, 0x71, 8
CENTURY = 0x32
SECOND = 1_000_000_000


class RtcState(DeviceState):
    """`divider`: nanoseconds since it has begun its second."""

    index: U8
    cmos: Annotated[bytes, msgspec.Meta(min_length=128, max_length=128)]
    divider: Annotated[int, msgspec.Meta(ge=-SECOND, le=SECOND)]


class Rtc(QuietDevice[RtcState]):
    """Ports 70 and 71. Bit 7 of the index (NMI mask) is kept, and masks nothing. Registers: chips/rtc.c."""

    TYPE = "rtc"
    STATE = RtcState
    irq = IRQ

    def __init__(self, board: Port, name: str, memory_size: int = 0) -> None:
        super().__init__(board, name)
        self.chip = _chips.Rtc(board.bus, self.number, IRQ)
        self.describe_memory(memory_size)
        self.describe_floppies(0, 0)
        self.date_set()

    def describe_memory(self, size: int) -> None:
        """The bytes by which firmware learns how much RAM there is: 15-18 (KiB above 1 MiB), 30, 31, 34, 35 (64 KiB
        above 16 MiB), 5B-5D (64 KiB above 4 GiB)."""
        low, *high = regions_of(size) if size else (Region(0, 0),)
        kib = min(max(low.size // 1024 - 1024, 0), 0xFFFF)
        above = min(max((low.size - (16 << 20)) // 65536, 0), 0xFFFF)
        beyond = sum(one.size for one in high) >> 16
        for at, number in ((0x15, 640), (0x17, kib), (0x30, kib), (0x34, above), (0x5B, beyond & 0xFFFF)):
            self.chip.put(at, number & 0xFF)
            self.chip.put(at + 1, number >> 8)
        self.chip.put(0x5D, beyond >> 16)
        self.chip.put(0x3D, 0x32)  # boot order: disk, CD, floppy
        self.chip.put(0x38, 0x10)
        self._sum()

    def describe_floppies(self, first: int, second: int) -> None:
        """Byte 10: the types of two drives, 0 where there is none; 14: what there is: drives, FPU, mouse."""
        self.chip.put(0x10, first << 4 | second)
        count = bool(first) + bool(second)
        self.chip.put(0x14, 0x06 | (1 | count - 1 << 6 if count else 0))
        self._sum()

    def _sum(self) -> None:
        """Bytes 2E and 2F: the sum of 10 to 2D, the upper half first, by which a BIOS trusts them."""
        total = sum(map(self.chip.get, range(0x10, 0x2E)))
        self.chip.put(0x2E, total >> 8)
        self.chip.put(0x2F, total & 0xFF)

    def say_resume(self) -> None:
        """Byte F, the shutdown status: firmware is to wake the system that has slept in S3 (as SeaBIOS and OVMF know
        it)."""
        self.chip.put(0x0F, 0xFE)

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", INDEX, 2),)

    def date_set(self) -> None:
        self.set_clock(self.board.date())

    def set_clock(self, date: int) -> None:
        """Show `date`, nanoseconds since 1970, UTC."""
        t = time.gmtime(date // SECOND)
        shown = t.tm_year, t.tm_mon, t.tm_mday, (t.tm_wday + 1) % 7, t.tm_hour, t.tm_min, t.tm_sec
        self.chip.set_clock(self.board.now(), shown, date % SECOND)

    def tell(self, power: Any) -> None:
        """Have ACPI's chip be told of its interrupts."""
        self.chip.tell(power)

    def connect(self, connected: bool) -> None:
        """Whether its interrupts go anywhere; an HPET may replace them."""
        self.chip.connect(self.board.now(), connected)
        self.board.chip_used()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        value = self.chip.read(region, offset, size)
        self.board.chip_used()
        return value

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        self.chip.write(region, offset, size, value)
        self.board.chip_used()

    # ---- life

    def reset(self) -> None:
        """The clock and CMOS go on, on their battery; a reset clears the interrupt enables and flags."""
        self.chip.reset(self.board.now())
        self.board.chip_used()

    def sleep_to_alarm(self) -> RtcState | None:
        """Go to the alarm that is enabled, while all else stands: what it is then. None: there is none."""
        slept = self.chip.sleep_to_alarm(self.board.now())
        self.board.chip_used()
        return self.save() if slept else None

    def time_shifted(self, by: int) -> None:
        self.chip.shift(by)

    def save(self) -> RtcState:
        return RtcState(**self.chip.state(self.board.now()))

    def load(self, state: RtcState) -> None:
        self.chip.load(now=self.board.now(), index=state.index, cmos=state.cmos, divider=state.divider)
        self.board.chip_used()
