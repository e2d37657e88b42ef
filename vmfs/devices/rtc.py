"""MC146818 real-time clock with its CMOS RAM: the time of day, an alarm, periodic and update interrupts.

The clock is the host's at the board's start, and goes with the guest's time from there. Nothing ticks while
nobody looks: what would have happened is worked out when a register is read, and a thread wakes the guest only for
interrupts that it has enabled.

Source: Motorola MC146818A data sheet; the CMOS bytes are those that PC firmware uses.
"""

from __future__ import annotations

import calendar
import threading
import time
from typing import Any

from vmfs.devices.board import Board
from vmfs.devices.device import Device, Window
from vmfs.words.errors import Invalid

INDEX, DATA, IRQ = 0x70, 0x71, 8
CENTURY = 0x32

_A, _B, _C, _D = 10, 11, 12, 13
_UIP = 0x80
_SET, _PIE, _AIE, _UIE, _BINARY, _24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
_IRQF, _PF, _AF, _UF = 0x80, 0x40, 0x20, 0x10
SECOND = 1_000_000_000
_UPDATE = 244_000  # ns before the update in which UIP is set


class Rtc(Device):
    """Ports 70 and 71. Bit 7 of the index (NMI mask) is kept, and masks nothing."""

    TYPE = "rtc"
    irq = IRQ

    def __init__(self, board: Board, name: str, memory_size: int = 0) -> None:
        super().__init__(board, name)
        self._timer: threading.Timer | None = None
        self.cmos = bytearray(128)
        self._origin = 0  # ns of the clock when the guest's time was 0
        self._seen = 0  # ns of the clock up to which events were worked out
        self._frozen = 0  # the time while SET is set
        self.describe_memory(memory_size)
        self.index = 0
        self.cmos[_A], self.cmos[_B], self.cmos[_D] = 0x26, _24H, 0x80
        self.set_clock(time.time_ns())

    def describe_memory(self, size: int) -> None:
        """The bytes by which firmware learns how much RAM there is: 15-18 (KiB above 1 MiB), 30, 31, 34, 35."""
        kib = min(max(size // 1024 - 1024, 0), 0xFFFF)
        above = min(max((size - (16 << 20)) // 65536, 0), 0xFFFF)
        self.cmos[0x15:0x19] = (640).to_bytes(2, "little") + kib.to_bytes(2, "little")
        self.cmos[0x30:0x32] = kib.to_bytes(2, "little")
        self.cmos[0x34:0x36] = above.to_bytes(2, "little")
        self.cmos[0x14] = 0x06  # equipment: FPU, mouse
        self.cmos[0x3D], self.cmos[0x38] = 0x32, 0x10  # boot order: disk, CD, floppy

    def windows(self) -> tuple[Window, ...]:
        return (Window("port", INDEX, 2),)

    # ---- time

    def set_clock(self, now: int) -> None:
        """The clock shows `now`, nanoseconds since 1970, UTC."""
        self._origin = now - self.board.now()
        self._seen = self._frozen = now

    def clock(self) -> int:
        return self._frozen if self.cmos[_B] & _SET else self._origin + self.board.now()

    def _encode(self, value: int) -> int:
        return value if self.cmos[_B] & _BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.cmos[_B] & _BINARY else (value >> 4) * 10 + (value & 15)

    def _hour(self, hour: int) -> int:
        if self.cmos[_B] & _24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _field(self, index: int) -> int:
        t = time.gmtime(self.clock() // SECOND)
        if index == 4:
            return self._hour(t.tm_hour)
        values = {0: t.tm_sec, 2: t.tm_min, 6: (t.tm_wday + 1) % 7 + 1, 7: t.tm_mday, 8: t.tm_mon,
                  9: t.tm_year % 100, CENTURY: t.tm_year // 100}  # fmt: skip
        return self._encode(values[index])

    def _set_field(self, index: int, value: int) -> None:
        t = list(time.gmtime(self.clock() // SECOND)[:6])
        if index == 4 and not self.cmos[_B] & _24H:
            hour = self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)
        else:
            hour = self._decode(value)
        number = hour if index == 4 else self._decode(value)
        if index == 9:
            t[0] = t[0] // 100 * 100 + number
        elif index == CENTURY:
            t[0] = number * 100 + t[0] % 100
        elif index == 6:
            return  # the day of the week follows the date
        else:
            t[{0: 5, 2: 4, 4: 3, 7: 2, 8: 1}[index]] = number
        if not 1970 <= t[0] <= 9999 or not 1 <= t[1] <= 12:
            return  # what is no date cannot be shown; a guest sets the rest next
        shown = calendar.timegm((*t, 0, 0, 0)) * SECOND + self.clock() % SECOND
        if self.cmos[_B] & _SET:
            self._frozen = shown
        else:
            self.set_clock(shown)

    # ---- events

    def _period(self) -> int:
        """Nanoseconds of the periodic interrupt; 0: off."""
        rate = self.cmos[_A] & 15
        if not rate or self.cmos[_A] & 0x70 != 0x20:
            return 0
        if rate < 3:
            rate += 7
        return SECOND >> (16 - rate) if rate <= 16 else 0

    def _alarm_matches(self, second: int) -> bool:
        t = time.gmtime(second)
        wanted = (self.cmos[1], self.cmos[3], self.cmos[5])
        shown = (self._encode(t.tm_sec), self._encode(t.tm_min), self._hour(t.tm_hour))
        return all(want >= 0xC0 or want == have for want, have in zip(wanted, shown, strict=True))

    def _catch_up(self) -> None:
        """Set the flags of what has happened since the last look."""
        now, was = self.clock(), self._seen
        if now <= was:
            return
        self._seen = now
        period = self._period()
        flags = 0
        if period and now // period != was // period:
            flags |= _PF
        first, last = was // SECOND + 1, now // SECOND
        if last >= first and not self.cmos[_B] & _SET:
            flags |= _UF
            # A day shows all times that an alarm can have.
            if any(self._alarm_matches(second) for second in range(max(first, last - 86400), last + 1)):
                flags |= _AF
        self.cmos[_C] |= flags

    def _update(self) -> None:
        self._catch_up()
        on = self.cmos[_C] & self.cmos[_B] & (_PF | _AF | _UF)
        self.cmos[_C] = self.cmos[_C] & ~_IRQF | (_IRQF if on else 0)
        self.set_irq(bool(on))
        self._arm()

    def _arm(self) -> None:
        """Wake up for the next interrupt that is enabled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        enabled = self.cmos[_B] & (_PIE | _AIE | _UIE)
        if not enabled or self.cmos[_C] & _IRQF:
            return
        now = self.clock()
        waits = []
        if enabled & _PIE and (period := self._period()):
            waits.append(period - now % period)
        if enabled & (_AIE | _UIE) and not self.cmos[_B] & _SET:
            waits.append(SECOND - now % SECOND)
        if waits:
            self._timer = threading.Timer(min(waits) / SECOND, self._tick)
            self._timer.daemon = True
            self._timer.start()

    def _tick(self) -> None:
        with self.board.lock:
            if self._timer is not None:
                self._update()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if offset == 0:
            return self.index if size == 1 else self.index | self.read(0, 1, 1) << 8
        index = self.index & 0x7F
        if index in (0, 2, 4, 6, 7, 8, 9, CENTURY):
            return self._field(index)
        if index == _A:
            updating = not self.cmos[_B] & _SET and SECOND - self.clock() % SECOND <= _UPDATE
            return self.cmos[_A] & 0x7F | (_UIP if updating else 0)
        if index == _C:
            self._update()
            value, self.cmos[_C] = self.cmos[_C], 0
            self.set_irq(False)  # even where the next event is due: an edge-triggered input has to see it
            self._update()
            return value
        return self.cmos[index]

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.index = value & 0xFF
            if size > 1:
                self.write(0, 1, 1, value >> 8 & 0xFF)
            return
        index, value = self.index & 0x7F, value & 0xFF
        if index in (0, 2, 4, 6, 7, 8, 9, CENTURY):
            self._set_field(index, value)
        elif index == _B:
            self._catch_up()
            frozen = self.clock()
            if value & _SET and not self.cmos[_B] & _SET:
                self.cmos[_B], self._frozen = value, frozen
            elif self.cmos[_B] & _SET and not value & _SET:
                self.cmos[_B] = value
                self.set_clock(frozen)
            else:
                self.cmos[_B] = value
        elif index == _A:
            self._catch_up()
            self.cmos[_A] = value & 0x7F
        elif index not in (_C, _D):
            self.cmos[index] = value
        if index in (1, 3, 5, _A, _B):
            self._update()

    # ---- life

    def reset(self) -> None:
        """The clock and CMOS go on, on their battery; a reset clears the interrupt enables and flags."""
        self.index = 0
        self.cmos[_B] &= ~(_PIE | _AIE | _UIE)
        self.cmos[_C] = 0
        self._update()

    def save(self) -> dict[str, Any]:
        self._catch_up()
        return {"index": self.index, "cmos": bytes(self.cmos), "clock": self.clock(), "seen": self._seen}

    def load(self, state: dict[str, Any]) -> None:
        if len(state["cmos"]) != 128 or not 0 <= state["index"] <= 0xFF:
            raise Invalid(f"{self.name}: that is no state of a real-time clock")
        self.index = state["index"]
        self.cmos[:] = state["cmos"]
        self.set_clock(state["clock"])
        self._seen = state["seen"]
        self._update()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
