"""The serial port, the clock, ACPI's fixed hardware and the debug ports, register by register."""

from __future__ import annotations

import calendar

import pytest
from devices.fakes import pass_time, plain, refuses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.words.errors import Invalid

SECOND = 1_000_000_000


# ---- 16550


@pytest.fixture
def sent(pc):
    sent = bytearray()
    pc.devices["com1"].output = sent.extend
    return sent


def test_serial_sends_and_receives(pc, guest, sent):
    for byte in b"hi":
        guest.out(0x3F8, byte)
    assert sent == b"hi" and guest.inp(0x3FD) == 0x60
    pc.devices["com1"].receive(b"ab")
    assert guest.inp(0x3FD) == 0x61
    assert guest.inp(0x3F8) == ord("a")
    assert guest.inp(0x3F8) == ord("b") and guest.inp(0x3FD) == 0x60


def test_serial_divisor_is_behind_dlab(guest, sent):
    guest.out(0x3FB, 0x83)
    guest.out(0x3F8, 1)
    guest.out(0x3F9, 2)
    assert (guest.inp(0x3F8), guest.inp(0x3F9)) == (1, 2) and not sent
    guest.out(0x3FB, 3)
    assert guest.inp(0x3F9) == 0


def test_serial_interrupts(pc, guest, machine):
    com1 = pc.devices["com1"]
    guest.out(0x3F9, 3)
    assert not machine.lines.get(4)  # OUT2 gates it
    guest.out(0x3FC, 8)
    assert machine.lines[4] and guest.inp(0x3FA) == 2  # the transmitter is empty; reading takes it back
    assert not machine.lines[4] and guest.inp(0x3FA) == 1
    com1.receive(b"x")
    assert machine.lines[4] and guest.inp(0x3FA) == 4
    guest.inp(0x3F8)
    assert not machine.lines[4]
    guest.out(0x3F8, 1)
    assert machine.lines[4] and guest.inp(0x3FA) == 2


def test_serial_keeps_what_does_not_fit(pc, guest):
    com1, taken = pc.devices["com1"], []
    com1.took = lambda: taken.append(len(com1.waiting))
    guest.out(0x3FC, 3)
    guest.out(0x3FA, 0xC1)
    text = bytes(range(100))
    com1.receive(text)
    assert len(com1.waiting) == 84
    assert guest.inp(0x3FA) == 0xC1  # FIFOs are there, no interrupt is enabled
    guest.out(0x3F9, 1)
    assert guest.inp(0x3FA) == 0xC4
    got = bytes(guest.inp(0x3F8) for _ in range(100))
    assert got == text and not com1.waiting and taken[-1] == 0
    guest.inp(0x3F8)


@pytest.mark.parametrize("listening", [(0x3FC, 3), (0x3F9, 1)], ids=["RTS", "interrupt"])
def test_serial_loses_nothing_to_a_driver_that_begins(pc, guest, listening):
    """What Linux does to a port until it listens: it clears the FIFO, and reads what may be there."""
    pc.devices["com1"].receive(b"typed before the driver was there")
    for fcr in (1, 0, 1, 7, 0):
        guest.out(0x3FA, fcr)
    guest.out(0x3FC, 0x1A)  # is it a UART?
    guest.out(0x3FC, 1)
    assert guest.inp(0x3FD) == 0x60 and guest.inp(0x3F8) == 0
    guest.out(0x3FA, 0x81)
    guest.out(*listening)
    assert bytes(guest.inp(0x3F8) for _ in range(33)) == b"typed before the driver was there"
    assert guest.inp(0x3FD) == 0x60


def test_serial_reaches_a_guest_that_only_polls(pc, guest):
    guest.out(0x3FC, 0)
    guest.out(0x3FA, 7)
    pc.devices["com1"].receive(b"ab")
    looks = 0
    while not guest.inp(0x3FD) & 1:
        looks += 1
        assert looks < 100
    assert (guest.inp(0x3F8), guest.inp(0x3FD) & 1, guest.inp(0x3F8)) == (ord("a"), 1, ord("b"))


def test_serial_gives_what_was_typed_to_the_guest_behind_a_reset(pc, guest):
    com1 = pc.devices["com1"]
    guest.out(0x3FA, 7)
    guest.out(0x3FC, 3)
    com1.receive(b"twenty bytes of text")
    com1.reset()
    assert guest.inp(0x3FD) & 1
    assert bytes(guest.inp(0x3F8) for _ in range(20)) == b"twenty bytes of text"


def test_serial_loopback(guest, sent):
    guest.out(0x3FC, 0x1A)
    assert guest.inp(0x3FE) & 0xF0 == 0x90  # RTS is CTS, OUT2 is DCD: how Linux finds a UART
    guest.out(0x3F8, 0x5A)
    assert not sent and guest.inp(0x3F8) == 0x5A
    for byte in (0x11, 0x22, 0x33):
        guest.out(0x3F8, byte)
    assert guest.inp(0x3FD) & 2 and not guest.inp(0x3FD) & 2
    assert guest.inp(0x3F8) == 0x33  # without a FIFO the newest is kept
    assert not guest.inp(0x3FD) & 1 and guest.inp(0x3F8) == 0x33  # and stays in the register
    guest.out(0x3FA, 1)
    for byte in range(20):
        guest.out(0x3F8, byte)
    assert guest.inp(0x3FD) & 2
    assert bytes(guest.inp(0x3F8) for _ in range(16)) == bytes(range(16))  # with one, what was in it
    assert not guest.inp(0x3FD) & 1


def test_serial_scratch_and_bytes_of_wider_accesses(guest, sent):
    guest.out(0x3FF, 0xA5)
    assert guest.inp(0x3FF) == 0xA5
    guest.out(0x3F8, 0x0041, 2)  # THR, then IER
    assert sent == b"A" and guest.inp(0x3F9) == 0


def test_serial_state_goes_along(pc, guest):
    com1, com2 = pc.devices["com1"], pc.devices["com2"]
    for port, value in ((0x3FA, 1), (0x3F9, 5), (0x3FC, 0xB), (0x3FF, 7)):
        guest.out(port, value)
    com1.receive(b"q" * 20)
    com2.load(com1.save())
    assert com2.save() == com1.save()
    assert guest.inp(0x2FF) == 7 and guest.inp(0x2F8) == ord("q")
    assert refuses(com2, {**plain(com1), "fifo": bytes(17)})


# ---- RTC


def cmos(guest, index, value=None):
    guest.out(0x70, index)
    if value is None:
        return guest.inp(0x71)
    guest.out(0x71, value)
    return None


def at(pc, machine, *date):
    machine.time = 0
    pc.devices["rtc"].set_clock(calendar.timegm((*date, 0, 0, 0)) * SECOND)


def test_rtc_shows_the_date_in_all_forms(pc, guest, machine):
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    shown = [cmos(guest, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)]
    assert shown == [0x58, 0x09, 0x21, 1, 0x22, 0x11, 0x26, 0x20]  # a Sunday
    cmos(guest, 11, 6)
    assert [cmos(guest, index) for index in (0, 4, 9, 0x32)] == [58, 21, 26, 20]
    cmos(guest, 11, 0)
    assert cmos(guest, 4) == 0x89  # 9 p.m., BCD
    machine.time = 2 * SECOND
    assert cmos(guest, 0) == 0 and cmos(guest, 2) == 0x10


def test_rtc_is_set_while_it_stands(pc, guest, machine):
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    cmos(guest, 11, 0x82)
    for index, value in ((0, 0x30), (2, 0x15), (4, 0x06), (7, 0x01), (8, 0x02), (9, 0x99), (0x32, 0x19)):
        cmos(guest, index, value)
    machine.time = 50 * SECOND
    assert cmos(guest, 0) == 0x30
    cmos(guest, 11, 2)
    machine.time = 51 * SECOND
    assert [cmos(guest, i) for i in (0, 2, 4, 7, 8, 9, 0x32)] == [0x31, 0x15, 0x06, 0x01, 0x02, 0x99, 0x19]


RAW = {0: 0x99, 2: 0x73, 4: 0x99, 6: 0x00, 7: 0x31, 8: 0x13, 9: 0x69, 0x32: 0x18, 1: 0xAB, 3: 0x60, 5: 0xC0}


def test_rtc_bytes_are_raw_while_it_is_set(pc, guest, machine):
    """Month 13h, hour 99h, a year before 1970, the weekday, the century: as written, with SET and after it."""
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    cmos(guest, 11, 0x82)
    for index, value in RAW.items():
        cmos(guest, index, value)
    machine.time = 5 * SECOND
    assert {index: cmos(guest, index) for index in RAW} == RAW
    cmos(guest, 11, 0x02)
    machine.time = 7 * SECOND
    assert {index: cmos(guest, index) for index in RAW} == RAW  # seconds that are none do not tick


@given(st.permutations([(0, 0x59), (2, 0x59), (4, 0x23), (6, 0x07), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x20)]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_rtc_is_set_in_any_order(pc, guest, machine, writes):
    """From a 29th of a February, which is in few of the years and months that the date is on its way through."""
    at(pc, machine, 2028, 2, 29, 0, 0, 0)
    cmos(guest, 11, 0x82)
    for index, value in writes:
        cmos(guest, index, value)
    assert all(cmos(guest, index) == value for index, value in writes)
    cmos(guest, 11, 0x02)
    assert all(cmos(guest, index) == value for index, value in writes)
    machine.time = SECOND
    shown = [cmos(guest, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)]
    assert shown == [0, 0, 0, 1, 1, 1, 0, 0x21]


def test_rtc_carries_over_years_and_knows_leap_years(pc, guest, machine):
    for before, days, after in (
        ((2027, 2, 28), 1, (0x27, 0x03, 0x01)),
        ((2028, 2, 28), 1, (0x28, 0x02, 0x29)),
        ((2100, 2, 28), 1, (0x00, 0x03, 0x01)),
        ((2026, 1, 31), 365, (0x27, 0x01, 0x31)),
        ((2000, 1, 1), 146_097 + 31, (0x00, 0x02, 0x01)),
    ):
        at(pc, machine, *before, 12, 0, 0)
        machine.time = days * 86400 * SECOND
        assert tuple(cmos(guest, index) for index in (9, 8, 7)) == after, before
    at(pc, machine, 2026, 6, 7, 23, 59, 59)
    for index, value in ((9, 0x00), (0x32, 0x00), (8, 0x12), (7, 0x31)):  # year 0
        cmos(guest, index, value)
    machine.time = SECOND
    assert [cmos(guest, index) for index in (7, 8, 9, 0x32)] == [1, 1, 1, 0]


def test_rtc_setting_stops_what_depends_on_it(pc, guest, machine):
    """SET going high clears UIE; updates are lost meanwhile, and the divider goes on."""
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    cmos(guest, 11, 0x12)
    cmos(guest, 11, 0x92)
    assert cmos(guest, 11) == 0x82
    pass_time(pc, 3 * SECOND + SECOND // 2)
    assert cmos(guest, 12) & 0x10 == 0 and not machine.lines.get(8) and machine.deadline is None
    cmos(guest, 11, 0x12)
    assert machine.deadline == 4 * SECOND and cmos(guest, 0) == 0x58
    pass_time(pc, 4 * SECOND)
    assert machine.lines[8] and cmos(guest, 12) == 0xD0 and cmos(guest, 0) == 0x59


def test_rtc_divider_in_reset_stands(pc, guest, machine):
    """As Linux sets the clock: the first update is half a second after the divider is let go."""
    at(pc, machine, 2026, 11, 22, 21, 9, 50)
    cmos(guest, 10, 0xF6)
    assert cmos(guest, 10) == 0x76  # UIP is read-only
    machine.time = 7 * SECOND
    assert cmos(guest, 0) == 0x50 and cmos(guest, 12) == 0
    cmos(guest, 10, 0x26)
    machine.time += SECOND // 2 - 1
    assert cmos(guest, 0) == 0x50 and cmos(guest, 10) == 0xA6
    machine.time += 1
    assert cmos(guest, 0) == 0x51 and cmos(guest, 10) == 0x26


@pytest.mark.parametrize("rate", range(1, 16))
def test_rtc_periodic_rates(pc, guest, machine, rate):
    """Two seconds of each have exactly so many, each of them an edge."""
    edges = []
    machine.irq_line = lambda gsi, level: edges.append(machine.time) if level else None
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    cmos(guest, 10, 0x20 | rate)
    cmos(guest, 12)
    cmos(guest, 11, 0x42)
    until = 2 * SECOND if rate in (1, 2) or rate > 5 else SECOND // 8
    while machine.deadline is not None and machine.deadline <= until:
        pass_time(pc, machine.deadline)
        assert cmos(guest, 12) & 0xC0 == 0xC0
    hertz = 256 >> rate - 1 if rate < 3 else 32768 >> rate - 1
    assert len(edges) == hertz * until // SECOND
    assert edges[:3] == [-(-SECOND * n // hertz) for n in range(1, 4)][: len(edges)]


def test_rtc_alarm_calls_once(pc, guest, machine):
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    for index, value in ((1, 0x07), (3, 0xC0), (5, 0x23)):
        cmos(guest, index, value)
    cmos(guest, 12)
    cmos(guest, 11, 0x22)
    due = 3600 * SECOND + 50 * 60 * SECOND + 9 * SECOND
    assert machine.deadline == due
    pass_time(pc, due)
    assert machine.lines[8] and cmos(guest, 12) & 0xA0 == 0xA0 and machine.deadline == due + 60 * SECOND
    cmos(guest, 5, 0x24)  # there is no such hour
    pass_time(pc, due + 2 * 86400 * SECOND)
    assert not cmos(guest, 12) & 0xA0 and machine.deadline is None


def test_rtc_date_is_the_boards(pc, guest, machine):
    """Which is that of its birth and the guest's time since; a clock that was set anew takes nothing away."""
    born = pc.date()
    machine.time = 90 * SECOND
    assert pc.date() == born + 90 * SECOND
    shown = cmos(guest, 0), cmos(guest, 2)
    cmos(guest, 12)
    cmos(guest, 11, 0x42)
    due = machine.deadline
    machine.time = 0
    pc.time_shifted(-90 * SECOND)
    assert pc.date() == born + 90 * SECOND and (cmos(guest, 0), cmos(guest, 2)) == shown
    assert machine.deadline == due - 90 * SECOND


def test_rtc_alarm_and_update_flags(pc, guest, machine):
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    for index, value in ((1, 0x00), (3, 0x10), (5, 0xFF)):  # every hour at :10:00
        cmos(guest, index, value)
    cmos(guest, 12)
    machine.time = SECOND
    assert cmos(guest, 12) == 0x50  # updated, and a period of the 1024 Hz has passed; no alarm
    machine.time = 2 * SECOND
    cmos(guest, 11, 0x22)
    assert machine.lines[8] and cmos(guest, 12) & 0xB0 == 0xB0
    assert not machine.lines[8] and cmos(guest, 12) == 0
    pc.reset()
    assert not cmos(guest, 11) & 0x70


@pytest.mark.parametrize("late", [0, 1, SECOND // 1024 - 1])
def test_rtc_every_interrupt_is_an_edge(pc, guest, machine, monkeypatch, late):
    """Also where register C is read as the next period begins: IRQ 8 is edge-triggered."""
    at(pc, machine, 2026, 11, 22, 21, 9, 58)
    levels = []
    monkeypatch.setattr(machine, "irq_line", lambda gsi, level: levels.append(level))
    cmos(guest, 12)
    cmos(guest, 11, 0x42)
    for _ in range(5):
        levels.clear()
        pass_time(pc, machine.deadline)
        machine.time += late
        assert levels == [True]
        assert cmos(guest, 12) & 0xC0 == 0xC0
        assert levels == [True, False] and machine.deadline > machine.time


def test_rtc_memory_and_state(pc, guest):
    assert cmos(guest, 0x15) | cmos(guest, 0x16) << 8 == 640
    assert cmos(guest, 0x30) | cmos(guest, 0x31) << 8 == 15 * 1024
    cmos(guest, 0x50, 0x77)
    cmos(guest, 13, 0)
    assert cmos(guest, 13) == 0x80
    rtc = pc.devices["rtc"]
    state = rtc.save()
    cmos(guest, 0x50, 0)
    rtc.load(state)
    assert cmos(guest, 0x50) == 0x77
    assert refuses(rtc, {**plain(rtc), "cmos": b""})


# ---- power


def test_pm_timer_tells_of_its_halves(pc, guest, machine):
    """TMR_STS at each change of bit 23, and the SCI where TMR_EN says so."""
    assert guest.inp(0x600, 2) == 0 and machine.deadline is None
    machine.time = 3 * SECOND
    assert guest.inp(0x600, 2) == 1
    guest.out(0x600, 1, 2)
    guest.out(0x602, 1, 2)
    assert guest.inp(0x600, 2) == 0 and not machine.lines.get(9)
    due = machine.deadline
    assert due == -(-(2 << 23) * SECOND // 3_579_545)
    pass_time(pc, due - 1)
    assert not machine.lines.get(9)
    pass_time(pc, due)
    assert machine.lines[9] and guest.inp(0x608, 4) == 0
    guest.out(0x600, 1, 2)
    assert not machine.lines[9] and machine.deadline > due


def test_pm_timer_follows_the_guests_time(guest, machine):
    before = guest.inp(0x608, 4)
    machine.time += SECOND
    assert guest.inp(0x608, 4) - before in (3_579_545, 3_579_545 - (1 << 24))


def test_sleeping_in_s5_powers_off(guest):
    """S5 is type 0: what everybody's code writes."""
    guest.out(0x604, 3 << 10 | 0x2000, 2)
    assert guest.ended is None
    guest.out(0x604, 5 << 10, 2)
    assert guest.ended is None and guest.inp(0x604, 2) == 5 << 10
    guest.out(0x604, 5 << 10 | 0x2000, 2)
    assert guest.ended is None
    guest.out(0x604, 0x2000, 2)
    assert guest.ended.line() == "shutdown cause=poweroff rip=0x1"


@pytest.mark.parametrize("alarm, enable, control", [(True, 0x400, 0x22), (False, 0x400, 0x02), (False, 0, 0x22)])
def test_the_clocks_alarm_wakes_from_s3(pc, guest, machine, alarm, enable, control):
    """The clock is at the alarm, with its other interrupts off; the machine's time stands."""
    def cmos(index, value=None):
        guest.out(0x70, index)
        return guest.inp(0x71) if value is None else guest.out(0x71, value)

    for index, value in ((0, 0x50), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x29), (0x32, 0x20)):
        cmos(index, value)
    for index, value in ((1, 0x10), (3, 0x30), (5, 0x07), (0xB, control | 0x40)):  # 07:30:10, of the next year
        cmos(index, value)
    guest.out(0x602, enable, 2)
    now = pc.now()
    guest.out(0x604, 0x2400, 2)
    assert guest.ended.cause == "suspend"
    pc.fall_asleep()
    assert pc.now() == now and guest.inp(0x600, 2) == (0x8400 if alarm else 0x8000)
    shown = [f"{cmos(index):02x}" for index in (9, 8, 7, 4, 2, 0)]
    assert shown == (["30", "01", "01", "07", "30", "10"] if alarm else ["29", "12", "31", "23", "59", "50"])
    assert cmos(0xB) == (0x22 if alarm else 0x02) and machine.lines.get(8, False) == alarm
    assert cmos(0xC) == (0xB0 if alarm else 0) and not machine.lines.get(8, False)


def test_the_power_button_is_an_sci(pc, guest, machine):
    power = pc.devices["power"]
    power.press_button()
    assert not machine.lines.get(9) and guest.inp(0x600, 2) == 0x100
    guest.out(0x602, 0x100, 2)
    assert machine.lines[9]
    guest.out(0x600, 0x100, 2)
    assert not machine.lines[9] and guest.inp(0x602, 2) == 0x100
    state = power.save()
    power.reset()
    power.load(state)
    assert guest.inp(0x602, 2) == 0x100


def test_a_general_purpose_event_is_an_sci(pc, guest, machine):
    """Its registers are written by bytes; PM1 has nothing of it."""
    power = pc.devices["power"]
    power.raise_event(0)
    assert not machine.lines.get(9) and guest.inp(0x60C, 4) == 1 and guest.inp(0x600, 4) == 0
    guest.out(0x60E, 1, 1)
    assert machine.lines[9] and guest.inp(0x60C, 4) == 0x1_0001
    state = power.save()
    guest.out(0x600, 0xFFFF, 2)
    guest.out(0x60D, 0xFF, 1)
    assert machine.lines[9] and guest.inp(0x60C, 1) == 1
    guest.out(0x60C, 1, 1)
    assert not machine.lines[9] and guest.inp(0x60C, 4) == 0x1_0000
    power.raise_event(9)
    assert guest.inp(0x60D, 1) == 2 and not machine.lines[9]
    power.reset()
    assert guest.inp(0x60C, 4) == 0
    power.load(state)
    assert guest.inp(0x60C, 4) == 0x1_0001 and machine.lines[9]


# ---- the generation ID


def generation(guest):
    return b"".join(guest.load(0xFEF0_0000 + at, 8).to_bytes(8, "little") for at in (0, 8))


def test_a_copy_has_another_generation_id(pc, guest, machine):
    first = generation(guest)
    assert any(first) and guest.load(0xFEF0_0010, 8) == 0 and guest.load(0xFEF0_0FF8, 8) == 0
    guest.store(0xFEF0_0000, 0, 8)
    pc.reset()
    assert generation(guest) == first and guest.inp(0x60C, 2) == 0
    assert guest.load(0xFEF0_0003, 2).to_bytes(2, "little") == first[3:5]
    guest.out(0x60E, 1, 1)
    pc.renew()
    second = generation(guest)
    assert second != first and machine.lines[9]
    pc.renew()
    assert generation(guest) not in (first, second)


def test_where_time_follows_the_instructions_a_copy_is_no_other(pc, guest, machine):
    """It comes of the seed, and stays."""
    pc.set_birth(1, bytes(16))
    first = generation(guest)
    pc.set_birth(1, bytes(15) + b"\1")
    assert generation(guest) != first
    pc.set_birth(2, bytes(16))
    assert generation(guest) == first
    pc.time_source = "instructions"
    pc.renew()
    assert generation(guest) == first and guest.inp(0x60C, 2) == 0


def test_a_machine_saved_before_there_was_one(pc):
    names = set(pc.devices)
    pc.check_names(names - {"vmgenid"})
    for wrong in (names - {"rtc"}, names | {"disk"}, names - {"vmgenid"} | {"disk"}):
        with pytest.raises(Invalid, match="rtc$|disk$"):
            pc.check_names(wrong)


# ---- debug ports


def test_debug_ports(pc, guest):
    said = bytearray()
    pc.devices["debugcon"].output = said.extend
    guest.out(0xE9, ord("!"))
    assert said == b"!" and guest.inp(0xE9) == guest.inp(0x402) == 0xE9
    guest.out(0xF4, 16, 4)
    assert guest.ended.line() == "shutdown cause=debug-exit code=33 rip=0x1"


def test_the_cmos_has_its_checksum(pc, guest):
    """As BIOSes leave it (IBM PC AT Technical Reference): also after a drive has come."""

    def byte(at):
        guest.out(0x70, at)
        return guest.inp(0x71)

    sums = []
    for types in ((0, 0), (4, 2)):
        pc.devices["rtc"].describe_floppies(*types)
        sums.append(byte(0x2E) << 8 | byte(0x2F))
        assert sums[-1] == sum(map(byte, range(0x10, 0x2E)))
    assert byte(0x10) == 0x42 and sums[0] != sums[1] != 0
