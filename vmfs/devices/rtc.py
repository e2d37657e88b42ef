"""MC146818 real-time clock with its CMOS RAM: the time of day, an alarm, periodic and update interrupts.

Its registers are bytes, and read back as they were written. An update makes the seconds one more and carries as far
as it goes; what is none of a field's values (month 13h) stays as it is, and nothing is carried into it or out of it.
While SET is set there are no updates. The divider goes on meanwhile: updates come at its seconds.

Nothing ticks while nobody looks: what has happened is worked out when a register is used, and the board calls only
for interrupts that are enabled. Daylight saving (DSE) and the square wave are bits that do nothing.

Source: Motorola MC146818A data sheet; the CMOS bytes are those that PC firmware uses.
"""

from __future__ import annotations

import datetime
import time
from typing import Annotated

import msgspec

from vmfs.devices.device import U8, DeviceState, Port, QuietDevice, Window
from vmfs.devices.timers import Timer

INDEX, DATA, IRQ = 0x70, 0x71, 8
CENTURY = 0x32

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_DATE = _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY
_SECONDS_ALARM, _MINUTES_ALARM, _HOURS_ALARM = 1, 3, 5
_DONT_CARE = 0xC0  # an alarm byte from here on matches all
_A, _B, _C, _D = 10, 11, 12, 13
_UIP = 0x80
_DIVIDER, _DIVIDER_RUNS = 0x70, 0x20  # above: the divider is held in reset, or tested
_SET, _PIE, _AIE, _UIE, _SQWE, _BINARY, _24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
_IRQF, _PF, _AF, _UF = 0x80, 0x40, 0x20, 0x10
SECOND = 1_000_000_000
CRYSTAL = 32768  # Hz
_UPDATE = 244_000  # ns before the update in which UIP is set
_CYCLE_YEARS, _CYCLE_DAYS = 400, 146_097  # of the Gregorian calendar


class RtcState(DeviceState):
    """`divider`: nanoseconds since it has begun its second."""

    index: U8
    cmos: Annotated[bytes, msgspec.Meta(min_length=128, max_length=128)]
    divider: Annotated[int, msgspec.Meta(ge=-SECOND, le=SECOND)]


class Rtc(QuietDevice[RtcState]):
    """Ports 70 and 71. Bit 7 of the index (NMI mask) is kept, and masks nothing."""

    TYPE = "rtc"
    STATE = RtcState
    irq = IRQ

    def __init__(self, board: Port, name: str, memory_size: int = 0) -> None:
        super().__init__(board, name)
        self._timer: Timer | None = None
        self.cmos = bytearray(128)
        self._second_began = 0  # the guest's time when the divider began the second that it is in
        self._seen = 0  # the guest's time up to which events were worked out
        self.describe_memory(memory_size)
        self.index = 0
        self.cmos[_A], self.cmos[_B], self.cmos[_D] = 0x26, _24H, 0x80
        self.set_clock(board.date())

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

    # ---- numbers and the bytes that show them

    def _byte(self, number: int) -> int:
        return number if self.cmos[_B] & _BINARY else number // 10 << 4 | number % 10

    def _number(self, byte: int) -> int | None:
        """What the byte shows; None where it is no BCD."""
        if self.cmos[_B] & _BINARY:
            return byte
        return (byte >> 4) * 10 + (byte & 15) if byte >> 4 < 10 and byte & 15 < 10 else None

    def _hour_byte(self, hour: int) -> int:
        if self.cmos[_B] & _24H:
            return self._byte(hour)
        return self._byte(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _hour_number(self, byte: int) -> int | None:
        if self.cmos[_B] & _24H:
            return self._number(byte)
        number = self._number(byte & 0x7F)
        return number % 12 + (12 if byte & 0x80 else 0) if number is not None and 1 <= number <= 12 else None

    def _time_of_day(self) -> tuple[int, int, int] | None:
        """Hour, minute and second, where all of them are some."""
        hour = self._hour_number(self.cmos[_HOURS])
        minute, second = self._number(self.cmos[_MINUTES]), self._number(self.cmos[_SECONDS])
        if hour is None or minute is None or second is None or hour > 23 or minute > 59 or second > 59:
            return None
        return hour, minute, second

    def _full_year(self) -> int | None:
        year, century = self._number(self.cmos[_YEAR]), self._number(self.cmos[CENTURY])
        if year is None or year > 99:
            return None
        return year + 100 * (century if century is not None and century < 100 else 20)

    def set_clock(self, date: int) -> None:
        """Show `date`, nanoseconds since 1970, UTC."""
        t = time.gmtime(date // SECOND)
        self._seen = self.board.now()
        self._second_began = self._seen - date % SECOND
        self.cmos[_HOURS] = self._hour_byte(t.tm_hour)
        for index, number in ((_SECONDS, t.tm_sec), (_MINUTES, t.tm_min), (_WEEKDAY, (t.tm_wday + 1) % 7 + 1),
                              (_DAY, t.tm_mday), (_MONTH, t.tm_mon), (_YEAR, t.tm_year % 100),
                              (CENTURY, t.tm_year // 100)):  # fmt: skip
            self.cmos[index] = self._byte(number)

    # ---- updates

    def _carry(self, index: int, first: int, count: int, by: int) -> int:
        """Turn a field of `count` values from `first` on; how often it went around."""
        number = self._number(self.cmos[index])
        if number is None or not first <= number < first + count:
            return 0
        around, at = divmod(number - first + by, count)
        self.cmos[index] = self._byte(first + at)
        return around

    def _carry_hours(self, by: int) -> int:
        hour = self._hour_number(self.cmos[_HOURS])
        if hour is None or hour > 23:
            return 0
        days, hour = divmod(hour + by, 24)
        self.cmos[_HOURS] = self._hour_byte(hour)
        return days

    def _carry_date(self, by: int) -> None:
        year, month, day = self._full_year(), self._number(self.cmos[_MONTH]), self._number(self.cmos[_DAY])
        if year is None or month is None or day is None:
            return
        cycles, by = divmod(by, _CYCLE_DAYS)
        cycle, year = divmod(year, _CYCLE_YEARS)
        try:  # in the years from 2000 on, as a date has no year 0
            date = datetime.date(2000 + year, month, day) + datetime.timedelta(by)
        except ValueError:
            return
        year = (date.year - 2000 + _CYCLE_YEARS * (cycle + cycles)) % 10000
        self.cmos[_DAY], self.cmos[_MONTH] = self._byte(date.day), self._byte(date.month)
        self.cmos[_YEAR] = self._byte(year % 100)
        century = self._number(self.cmos[CENTURY])
        if century is not None and century < 100:
            self.cmos[CENTURY] = self._byte(year // 100)

    def _update_time(self, seconds: int) -> None:
        """So many updates."""
        by = self._carry(_SECONDS, 0, 60, seconds)
        by = self._carry(_MINUTES, 0, 60, by) if by else 0
        by = self._carry_hours(by) if by else 0
        if by:
            self._carry(_WEEKDAY, 1, 7, by)
            self._carry_date(by)

    def _updates_to_alarm(self) -> int | None:
        """How many updates from here the alarm matches; None: it does not, or the time is none."""
        at = self._time_of_day()
        if at is None:
            return None
        hours, minutes, seconds = (self.cmos[index] for index in (_HOURS_ALARM, _MINUTES_ALARM, _SECONDS_ALARM))
        start = (at[0] * 60 + at[1]) * 60 + at[2]
        t = start + 1
        while t <= start + 86400:
            hour, minute, second = t // 3600 % 24, t // 60 % 60, t % 60
            if hours < _DONT_CARE and hours != self._hour_byte(hour):
                t = (t // 3600 + 1) * 3600
            elif minutes < _DONT_CARE and minutes != self._byte(minute):
                t = (t // 60 + 1) * 60
            elif seconds < _DONT_CARE and seconds != self._byte(second):
                t += 1
            else:
                return t - start
        return None

    # ---- the divider

    @property
    def _runs(self) -> bool:
        return self.cmos[_A] & _DIVIDER <= _DIVIDER_RUNS

    def _period(self) -> int:
        """Of the periodic interrupt, in cycles of the crystal; 0: off."""
        rate = self.cmos[_A] & 15
        return 1 << (rate + 6 if rate < 3 else rate - 1) if rate else 0

    def _catch_up(self) -> int:
        """Work out what has happened since the last look; the guest's time."""
        now = self.board.now()
        if now <= self._seen:
            return now
        was, self._seen = self._seen - self._second_began, now
        if not self._runs:
            return now
        elapsed = now - self._second_began
        period = self._period()
        if period and elapsed * CRYSTAL // SECOND // period != was * CRYSTAL // SECOND // period:
            self.cmos[_C] |= _PF
        updates = elapsed // SECOND
        if updates > 0:
            self._second_began += updates * SECOND
            if not self.cmos[_B] & _SET:
                alarm = self._updates_to_alarm()
                self.cmos[_C] |= _UF | (_AF if alarm is not None and alarm <= updates else 0)
                self._update_time(updates)
        return now

    # ---- interrupts

    def _update(self) -> None:
        now = self._catch_up()
        on = self.cmos[_C] & self.cmos[_B] & (_PF | _AF | _UF)
        self.cmos[_C] = self.cmos[_C] & ~_IRQF | (_IRQF if on else 0)
        self.set_irq(bool(on))
        self._arm(now)

    def _arm(self, now: int) -> None:
        """Be called for the next interrupt that is enabled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        enabled = self.cmos[_B]
        if not self._runs or not enabled & (_PIE | _AIE | _UIE) or self.cmos[_C] & _IRQF:
            return
        times = []
        if enabled & _PIE and (period := self._period()):
            cycles = ((now - self._second_began) * CRYSTAL // SECOND // period + 1) * period
            times.append(-(-cycles * SECOND // CRYSTAL))
        if enabled & _UIE and not enabled & _SET:
            times.append(SECOND)
        if enabled & _AIE and not enabled & _SET and (updates := self._updates_to_alarm()) is not None:
            times.append(updates * SECOND)
        if times:
            self._timer = self.board.schedule(self._second_began + min(times), self._update)

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if offset == 0:
            return self.index if size == 1 else self.index | self.read(0, 1, 1) << 8
        index = self.index & 0x7F
        if index == _C:
            self._update()
            value, self.cmos[_C] = self.cmos[_C], 0
            self.set_irq(False)  # even where the next event is due: an edge-triggered input has to see it
            self._update()
            return value
        now = self._catch_up()
        if index == _A:
            soon = self._runs and not self.cmos[_B] & _SET and self._second_began + SECOND - now <= _UPDATE
            return self.cmos[_A] | (_UIP if soon else 0)
        return self.cmos[index]

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.index = value & 0xFF
            if size > 1:
                self.write(0, 1, 1, value >> 8 & 0xFF)
            return
        index, value = self.index & 0x7F, value & 0xFF
        now = self._catch_up()
        if index == _A:
            was_running = self._runs
            self.cmos[_A] = value & ~_UIP
            if self._runs and not was_running:  # "the first update cycle begins one-half second later"
                self._second_began = now - SECOND // 2
        elif index == _B:
            self._write_b(value)
        elif index not in (_C, _D):
            self.cmos[index] = value
        self._update()

    def _write_b(self, value: int) -> None:
        was = self.cmos[_B]
        if value & _SET and not was & _SET:
            value &= ~_UIE  # "the SET bit going high clears it"
        date = None
        if (value ^ was) & (_BINARY | _24H) and not (value | was) & _SET:
            # Bytes of the other form are to be written by the program, says the data sheet. For one that does not, and
            # does not stop the clock, the time goes on in the new form (as on QEMU).
            date = self._time_of_day(), [self._number(self.cmos[index]) for index in _DATE]
        self.cmos[_B] = value
        if date is not None:
            self._show(*date)

    def _show(self, at: tuple[int, int, int] | None, numbers: list[int | None]) -> None:
        """The same time in the form that register B says."""
        if at is not None:
            self.cmos[_HOURS] = self._hour_byte(at[0])
            self.cmos[_MINUTES], self.cmos[_SECONDS] = self._byte(at[1]), self._byte(at[2])
        for index, number in zip(_DATE, numbers, strict=True):
            if number is not None and number < 100:
                self.cmos[index] = self._byte(number)

    # ---- life

    def reset(self) -> None:
        """The clock and CMOS go on, on their battery; a reset clears the interrupt enables and flags."""
        self.index = 0
        self._catch_up()
        self.cmos[_B] &= ~(_PIE | _AIE | _UIE | _SQWE)
        self.cmos[_C] = 0
        self._update()

    def time_shifted(self, by: int) -> None:
        self._second_began += by
        self._seen += by

    def save(self) -> RtcState:
        now = self._catch_up()
        return RtcState(index=self.index, cmos=bytes(self.cmos), divider=now - self._second_began)

    def load(self, state: RtcState) -> None:
        self.index = state.index
        self.cmos[:] = state.cmos
        self._seen = self.board.now()
        self._second_began = self._seen - state.divider
        self._update()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
