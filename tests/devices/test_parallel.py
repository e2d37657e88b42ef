"""The parallel port and its printer; the speaker's tone, of a timer's state."""

from __future__ import annotations

import struct

import pytest
from devices.fakes import plain, refuses

from vmfs.devices.speaker import tone
from vmfs.words import layouts

DATA, STATUS, CONTROL = 0x378, 0x379, 0x37A
STROBE, RUNS, SELECT, INTERRUPTS = 1, 4, 8, 0x10
READY, BUSY = 0xDF, 0x5F


@pytest.fixture
def lpt(pc):
    return pc.devices["lpt1"]


def send(guest, byte, control=RUNS | SELECT):
    guest.out(DATA, byte)
    guest.out(CONTROL, control | STROBE)
    guest.out(CONTROL, control)


def test_a_byte_goes_when_the_strobe_comes(guest, lpt):
    printed = []
    lpt.output = printed.append
    guest.out(CONTROL, RUNS | SELECT)
    assert guest.inp(STATUS) == READY
    guest.out(DATA, ord("a"))
    assert printed == []
    guest.out(CONTROL, RUNS | SELECT | STROBE)
    assert printed == [b"a"] and guest.inp(STATUS) == BUSY
    guest.out(CONTROL, RUNS | SELECT | STROBE)
    assert printed == [b"a"], "the strobe is still there"
    guest.out(CONTROL, RUNS | SELECT)
    assert guest.inp(STATUS) == READY
    send(guest, ord("b"))
    assert printed == [b"a", b"b"] and bytes(lpt.sent.save()) == b"ab" and lpt.counters["sent"] == 2


def test_what_drivers_look_for(guest, lpt):
    """Both registers hold what is written; no direction, which is a PS/2's; a status that cannot be cleared."""
    for value in (0x55, 0xAA):
        guest.out(DATA, value)
        guest.out(CONTROL, 0x2C)
        assert guest.inp(DATA) == value and guest.inp(CONTROL) == 0xEC
    guest.out(STATUS, 0)
    assert guest.inp(STATUS) == READY
    guest.out(DATA, 0x0C55, 2)
    assert guest.inp(DATA, 2) == READY << 8 | 0x55


def test_a_printer_in_reset_takes_nothing(guest, lpt):
    guest.out(CONTROL, SELECT)
    assert guest.inp(STATUS) == BUSY
    send(guest, ord("x"), SELECT)
    assert lpt.sent.save() == b""
    send(guest, ord("z"))
    assert lpt.sent.save() == b"z"


@pytest.mark.parametrize("wanted, count", [(INTERRUPTS, 3), (0, 0)])
def test_an_interrupt_for_each_byte(pc, guest, lpt, wanted, count):
    rises, was = [], pc.machine.irq_line

    def line(gsi, level):
        rises.extend([gsi] * level)
        was(gsi, level)

    pc.machine.irq_line = line
    guest.out(CONTROL, RUNS | SELECT | wanted)
    for byte in b"abc":
        send(guest, byte, RUNS | SELECT | wanted)
    assert rises == [7] * count and not pc.machine.lines.get(7)


def test_states_that_cannot_be(guest, lpt):
    send(guest, 5)
    state = plain(lpt)
    for change in ({"control": 0x20}, {"data": 256}, {"sent": "text"}):
        assert refuses(lpt, {**state, **change}), change
    assert not refuses(lpt, state)
    lpt.reset()
    assert lpt.sent.save() == b"\5", "a reset takes no print back"


def pit(count, mode, gate, flags):
    channel = layouts.PIT_CHANNEL.pack(count, *[0] * 8, mode, 0, gate, 0)
    return bytes(2 * layouts.PIT_CHANNEL.size) + channel + struct.pack("<I9I", flags, *[0] * 9)


@pytest.mark.parametrize(
    "state, hertz",
    [
        (pit(2712, 3, 1, 2), 439.96),
        (pit(2712, 2, 1, 3), 439.96),
        (pit(0, 3, 1, 2), 18.2),
        (pit(0x10000, 3, 1, 2), 18.2),
        (pit(2712, 3, 0, 2), 0),  # the gate is closed
        (pit(2712, 3, 1, 1), 0),  # the speaker is off
        (pit(2712, 0, 1, 2), 0),  # once
    ],
)
def test_tones(state, hertz):
    assert tone(state) == pytest.approx(hertz, abs=0.01)
