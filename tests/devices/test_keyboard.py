"""The keyboard controller, keyboard and mouse, as drivers probe them; and what `keyboard` takes."""

from __future__ import annotations

import pytest
from devices.fakes import FakeMachine, Guest, pass_time, plain, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from vmfs.devices import i8042, keys, moves
from vmfs.devices.machine import Pc
from vmfs.memory.ram import Memory
from vmfs.words.errors import Invalid, Unsupported, WouldBlock

FULL, FROM_MOUSE = 0x01, 0x20


def status(guest):
    return guest.inp(0x64)


def drain(guest):
    """All that can be read, and for each byte whether it is the mouse's."""
    data = []
    while status(guest) & FULL:
        from_mouse = bool(status(guest) & FROM_MOUSE)
        data.append((guest.inp(0x60), from_mouse))
        assert len(data) < 1000
    return data


def answer(guest, *data):
    """What the keyboard says to bytes."""
    result = []
    for byte in data:
        guest.out(0x60, byte)
        result += drain(guest)
    assert not any(from_mouse for _, from_mouse in result)
    return bytes(byte for byte, _ in result)


def mouse(guest, *data):
    result = []
    for byte in data:
        guest.out(0x64, 0xD4)
        guest.out(0x60, byte)
        result += drain(guest)
    assert all(from_mouse for _, from_mouse in result)
    return bytes(byte for byte, _ in result)


def controller(guest, command, *arguments):
    guest.out(0x64, command)
    for argument in arguments:
        guest.out(0x60, argument)
    return bytes(byte for byte, _ in drain(guest))


def wait(pc):
    """So long that the next key may come."""
    pass_time(pc, pc.machine.time + i8042.KEY_TIME)


def typed(pc, guest, text):
    """The bytes that a guest gets when `text` is written to `keyboard`."""
    pc.keyboard.type(keys.parse(text))
    data = b""
    while part := bytes(byte for byte, _ in drain(guest)):
        data += part
        wait(pc)
    return data


# ---- the controller


def test_the_command_byte_and_the_tests(pc, guest):
    assert status(guest) & (FULL | 2) == 0
    assert controller(guest, 0xAA) == b"\x55" and controller(guest, 0xAB) == b"\0" == controller(guest, 0xA9)
    assert controller(guest, 0x20) == b"\x47" and controller(guest, 0xA4) == b"\xf1"
    controller(guest, 0x60, 0x44)
    assert controller(guest, 0x20) == b"\x44"
    controller(guest, 0x65, 0x99)
    assert controller(guest, 0x25) == b"\x99"
    assert controller(guest, 0xC0) == b"\x80"


def test_linux_finds_the_mouse_port(pc, guest):
    """i8042_check_aux: loop-back, and switching it off and on by its bit of the command byte."""
    guest.out(0x64, 0xD3)
    guest.out(0x60, 0x5A)
    assert drain(guest) == [(0x5A, True)]
    for command, bit in ((0xA7, 0x20), (0xA8, 0), (0xAD, 0x10), (0xAE, 0)):
        controller(guest, command)
        assert controller(guest, 0x20)[0] & 0x30 == bit
    guest.out(0x64, 0xD2)
    guest.out(0x60, 0x77)
    assert drain(guest) == [(0x77, False)]


def test_each_byte_is_an_edge_on_its_line(pc, guest, machine):
    edges = []
    irq_line = machine.irq_line
    machine.irq_line = lambda gsi, level: (edges.append((gsi, level)), irq_line(gsi, level))
    assert answer(guest, 0xF2) == b"\xfa\xab\x41"
    assert edges == [(1, True), (1, False)] * 3
    edges.clear()
    assert mouse(guest, 0xF2) == b"\xfa\0"
    assert edges == [(12, True), (12, False)] * 2
    controller(guest, 0x60, 0x44)
    edges.clear()
    answer(guest, 0xEE)
    mouse(guest, 0xF2)
    assert edges == []


def test_a_disabled_keyboard_waits(pc, guest):
    controller(guest, 0xAD)
    pc.keyboard.type(keys.parse("a"))
    assert drain(guest) == []
    controller_bytes = controller(guest, 0xAE)
    assert controller_bytes == b"\x1e"


def test_resets(pc, guest):
    for writes in ([(0x64, 0xFE)], [(0x92, 3)], [(0x64, 0xD1), (0x60, 0xFE)]):
        for port, value in writes:
            guest.out(port, value)
        assert guest.ended is not None and guest.ended.cause == "reset", writes
        pc.reset()
    guest.out(0x64, 0xFF)
    assert guest.ended is None


def test_the_a20_gate(pc, guest, machine):
    assert guest.inp(0x92) == 2 and controller(guest, 0xD0)[0] & 2
    guest.out(0x92, 0)
    assert machine.a20 is False and guest.inp(0x92) == 0 and controller(guest, 0xD0)[0] & 2 == 0
    guest.out(0x92, 0xC8)  # the lights of the disk, and the lock
    assert guest.inp(0x92) == 0xC8
    guest.out(0x64, 0xDF)
    assert machine.a20 is True and guest.inp(0x92) == 0xCA
    controller(guest, 0xD1, 0xDD)
    assert machine.a20 is False
    other = FakeMachine()
    pc.move_to(other)
    assert other.a20 is False
    pc.reset()
    assert other.a20 is True


def test_where_the_engine_has_no_a20_gate_the_guest_reads_that_it_is_open(pc, guest, machine, monkeypatch):
    def refuse(enabled):
        raise Unsupported("always on")

    monkeypatch.setattr(machine, "set_a20", refuse)
    guest.out(0x92, 0)
    assert guest.inp(0x92) == 2 and pc.keyboard.describe()["a20"] == "on"


# ---- the devices


def test_the_keyboard_answers(pc, guest):
    assert answer(guest, 0xFF) == b"\xfa\xaa"
    assert answer(guest, 0xED, 5) == b"\xfa\xfa" and pc.keyboard.describe()["leds"] == "scrolllock capslock"
    assert answer(guest, 0xF3, 0) == b"\xfa\xfa"
    assert answer(guest, 0xEE) == b"\xee" and answer(guest, 0xFE) == b"\xee"
    assert answer(guest, 0xF0, 0) == b"\xfa\xfa\x41"  # set 2, translated
    assert answer(guest, 0xF0, 3) == b"\xfa\xfe" and answer(guest, 0x12) == b"\xfe"
    controller(guest, 0x60, 0x07)  # not translated
    assert answer(guest, 0xF2) == b"\xfa\xab\x83" and answer(guest, 0xF0, 0) == b"\xfa\xfa\x02"


def test_the_mouse_is_one_with_a_wheel_for_who_knocks(pc, guest):
    assert mouse(guest, 0xFF) == b"\xfa\xaa\0"
    assert mouse(guest, 0xF2) == b"\xfa\0" and mouse(guest, 0xEB) == b"\xfa\x08\0\0"
    for rates, number in (((200, 100, 80), 3), ((200, 200, 80), 4)):
        for rate in rates:
            assert mouse(guest, 0xF3, rate) == b"\xfa\xfa"
        assert mouse(guest, 0xF2) == bytes((0xFA, number))
    assert mouse(guest, 0xEB) == b"\xfa\x08\0\0\0"
    assert mouse(guest, 0xE8, 3, 0xE7, 0xF4, 0xE9) == b"\xfa\xfa\xfa\xfa\xfa\x30\x03\x50"
    assert mouse(guest, 0xF6, 0xE9) == b"\xfa\xfa\0\x02\x64"
    assert mouse(guest, 0xEE, 0x12, 0xEC) == b"\xfa\x12\xfa"


# ---- typing


def test_what_is_typed_comes_as_scan_codes(pc, guest):
    assert typed(pc, guest, "a") == b"\x1e\x9e"
    assert typed(pc, guest, '"aB!"') == b"\x1e\x9e" + b"\x2a\x30\xb0\xaa" + b"\x2a\x02\x82\xaa"
    assert typed(pc, guest, "ctrl-alt-del") == b"\x1d\x38\xe0\x53" + b"\xe0\xd3\xb8\x9d"
    assert typed(pc, guest, "print") == b"\xe0\x2a\xe0\x37\xe0\xb7\xe0\xaa"
    assert typed(pc, guest, "pause") == b"\xe1\x1d\x45\xe1\x9d\xc5"
    controller(guest, 0x60, 0x07)
    assert typed(pc, guest, "a f7 right") == b"\x1c\xf0\x1c\x83\xf0\x83\xe0\x74\xe0\xf0\x74"
    answer(guest, 0xF0, 1)
    assert typed(pc, guest, "a") == b"\x1e\x9e"


def test_keys_wait_until_the_guest_has_taken_the_one_before(pc, guest, machine):
    """The guest looks each millisecond: all comes in order, each key KEY_TIME after the one before was taken."""
    text = "the quick brown fox " * 3
    codes = [code for chord in keys.of_text(text) for code in keys.chord_codes(chord)]
    pc.keyboard.type(keys.of_text(text))
    got = []
    while len(got) < len(codes):
        if data := bytes(byte for byte, _ in drain(guest)):
            got.append((machine.time, data))
        pass_time(pc, machine.time + 1_000_000)
    assert b"".join(data for _, data in got) == b"".join(map(keys.translated, codes))
    assert [when for when, _ in got] == [number * i8042.KEY_TIME for number in range(len(codes))]
    assert pc.keyboard.describe()["waiting"] == "0" and machine.deadline is None


def test_there_is_an_end_to_what_waits(pc, guest):
    pc.keyboard.type([("a",)] * (i8042.TYPED_MOST // 2))
    before = pc.keyboard.describe()
    with pytest.raises(WouldBlock, match="does not take them"):
        pc.keyboard.type([("a",)] * 2)
    assert pc.keyboard.describe() == before
    pc.reset()
    assert pc.keyboard.describe()["waiting"] == "0"


def test_a_keyboard_that_is_switched_off_takes_no_key_until_it_is_on(pc, guest):
    assert answer(guest, 0xF5) == b"\xfa"
    pc.keyboard.type(keys.parse("x"))
    wait(pc)
    assert drain(guest) == []
    assert answer(guest, 0xF4) == b"\xfa"
    wait(pc)
    assert drain(guest) == [(0x2D, False)]


def test_state_goes_to_another_machine(pc, guest, memory):
    mouse(guest, 0xE8)
    answer(guest, 0xED, 2)
    guest.out(0x92, 0)
    pc.keyboard.type(keys.parse("a b"))
    state = pc.keyboard.save()
    machine = FakeMachine()
    other = Pc(machine, memory)
    try:
        other.keyboard.load(state)
        assert other.keyboard.save() == state and machine.a20 is False and machine.lines[1]
        there = Guest(other)
        assert there.inp(0x60) == 0x1E
        wait(other)
        assert there.inp(0x60) == 0x9E
        there.out(0x64, 0xD4)
        there.out(0x60, 1)  # the resolution that was announced
        assert drain(there)[-1] == (0xFA, True) and other.keyboard.mouse.resolution == 1
        now = plain(other.keyboard)
        for change in ({"control": 256}, {"ram": b""}, {"keyboard": {**now["keyboard"], "scan_set": 9}}):
            assert refuses(other.keyboard, {**now, **change})
    finally:
        other.close()


_BYTES = st.one_of(st.integers(0, 255), st.sampled_from((0xD1, 0xD3, 0xD4, 0x60, 0xF3, 0xF0, 0xFF, 0xED, 0xEE)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((0x60, 0x64, 0x92)), _BYTES, st.booleans())))
def test_no_sequence_gets_it_out_of_order(accesses):
    memory = Memory(1 << 20)
    pc = Pc(FakeMachine(), memory)
    try:
        guest = Guest(pc)
        for port, value, out in accesses:
            if out:
                guest.out(port, value)
            else:
                guest.inp(port)
        state = pc.keyboard.save()
        pc.keyboard.load(state)
        assert pc.keyboard.save() == state
        drain(guest)
        assert not pc.machine.lines.get(1) and not pc.machine.lines.get(12)
        guest.out(0x64, 0xAA)
        assert drain(guest)[0][0] == 0x55
    finally:
        pc.close()
        memory.close()


# ---- names


def test_every_key_goes_down_and_up():
    sent = set()
    for name in keys.KEYS:
        down, up = keys.codes(name, True), keys.codes(name, False)
        assert down and (up or name == "pause") and (down, up) not in sent
        sent.add((down, up))


def test_words_chords_and_texts():
    assert keys.parse("a  enter\nctrl-alt-del\t-") == [("a",), ("enter",), ("ctrl", "alt", "del"), ("minus",)]
    assert keys.parse("A ctrl-C ctrl-- Escape ?") == [
        ("shift", "a"), ("ctrl", "shift", "c"), ("ctrl", "minus"), ("esc",), ("shift", "slash"),
    ]  # fmt: skip
    assert keys.parse(r'"a\n\t\"\\"') == [("a",), ("enter",), ("tab",), ("shift", "apostrophe"), ("backslash",)]


@pytest.mark.parametrize(
    "text", ["", " \n", "nokey", '"open', '"a"b', 'a"b"', "ctrl-", "ctrl-alt-nokey", r'"\q"', '"é"', "\x00"]
)
def test_what_is_no_key_is_refused(text):
    with pytest.raises(Invalid):
        keys.parse(text)


@given(st.text(alphabet=[chr(code) for code in range(32, 127)]))
def test_any_ascii_text_can_be_typed(text):
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    chords = keys.of_text(text)
    assert len(chords) == len(text)
    if text:
        assert keys.parse(quoted) == chords
    for chord in chords:
        pressed = keys.chord_codes(chord)
        assert len(pressed) == 2 * len(chord)


@given(st.text())
def test_any_text_is_parsed_or_refused(text):
    try:
        assert keys.parse(text)
    except Invalid:
        pass


# ---- the mouse moves


def moved(pc, guest, x, y, wheel=0, buttons=0):
    """What the guest reads of a move."""
    pc.keyboard.move_mouse(x, y, wheel, buttons)
    data = drain(guest)
    assert all(from_mouse for _, from_mouse in data)
    return bytes(byte for byte, _ in data)


def test_a_move_is_a_packet(pc, guest):
    assert moved(pc, guest, 5, 5) == b""  # nobody has switched it on
    assert mouse(guest, 0xF4) == b"\xfa"
    assert moved(pc, guest, 3, 4) == bytes((0x28, 3, 0xFC))  # up is positive
    assert moved(pc, guest, -3, -4) == bytes((0x18, 0xFD, 4))
    assert moved(pc, guest, 0, 0, buttons=1) == bytes((0x09, 0, 0))
    assert moved(pc, guest, 0, 0, buttons=7) == bytes((0x0F, 0, 0))
    assert moved(pc, guest, 0, 0, buttons=0, wheel=1) == bytes((0x08, 0, 0))  # it has no wheel yet
    assert moved(pc, guest, 600, 0) == bytes((8, 255, 0, 8, 255, 0, 8, 90, 0))
    assert mouse(guest, 0xE9) == b"\xfa\x20\x02\x64"
    assert mouse(guest, 0xF5) == b"\xfa"
    assert moved(pc, guest, 1, 1) == b""


def test_the_interrupt_comes_for_each_byte(pc, guest):
    mouse(guest, 0xF4)
    controller(guest, 0x60, 0x47)
    pc.keyboard.move_mouse(1, 0, 0, 0)
    for _ in range(3):
        assert pc.machine.lines[12]
        guest.inp(0x60)
    assert not pc.machine.lines[12]


def test_what_it_moves_adds_up_while_nobody_reads(pc, guest):
    mouse(guest, 0xF4)
    for _ in range(1000):
        pc.keyboard.move_mouse(1, -1, 0, 0)
    data = bytes(byte for byte, _ in drain(guest))
    packets = [data[at : at + 3] for at in range(0, len(data), 3)]
    assert sum(one[1] for one in packets) == sum(one[2] for one in packets) == 1000
    assert len(packets) < 10
    pc.keyboard.move_mouse(0, 0, 0, 1)
    pc.keyboard.move_mouse(0, 0, 0, 0)
    pc.keyboard.move_mouse(0, 0, 0, 1)
    pc.keyboard.move_mouse(0, 0, 0, 0)
    heads = [byte for byte, _ in drain(guest)][::3]
    assert heads == [9, 8, 9, 8]  # no click is lost


def test_wheel_and_side_buttons(pc, guest):
    mouse(guest, 0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF4)
    assert mouse(guest, 0xF2) == b"\xfa\x03"
    assert moved(pc, guest, 0, 0, wheel=1) == bytes((8, 0, 0, 1))
    assert moved(pc, guest, 0, 0, wheel=-2) == bytes((8, 0, 0, 0xFE))
    mouse(guest, 0xF3, 200, 0xF3, 200, 0xF3, 80)
    assert mouse(guest, 0xF2) == b"\xfa\x04"
    assert moved(pc, guest, 1, 0, wheel=-1, buttons=8) == bytes((8, 1, 0, 0x1F))
    assert moved(pc, guest, 0, 0, buttons=0) == bytes((8, 0, 0, 0))


def test_remote_mode_and_scaling(pc, guest):
    mouse(guest, 0xF4, 0xE7)
    assert [moved(pc, guest, way, 0)[1] for way in (1, 2, 3, 4, 5, 6)] == [1, 1, 3, 6, 9, 12]
    mouse(guest, 0xE6, 0xF0)
    assert moved(pc, guest, 7, 0) == b""
    pc.keyboard.move_mouse(0, 0, 0, 2)
    assert mouse(guest, 0xEB) == b"\xfa\x0a\0\0"
    assert mouse(guest, 0xE9)[1] == 0x61  # remote, enabled, the right button


def test_moves_are_inputs_with_bounds(pc, guest):
    mouse(guest, 0xF4)
    assert moved(pc, guest, 1 << 40, -(1 << 40), wheel=999, buttons=0xFF)[:1] != b""
    state = plain(pc.keyboard)
    assert abs(state["mouse"]["x"]) <= 1 << 14
    state["mouse"]["x"] = (1 << 14) + 1
    assert refuses(pc.keyboard, state)
    with pytest.raises(Invalid, match="no move of a mouse"):
        pc.keyboard.check_input("mouse", b"123")


def done(pc, guest, text):
    """The packets that a guest gets when `text` is written to `mouse`: buttons, x, y."""
    pc.keyboard.move(moves.parse(text))
    data = bytes(byte for byte, from_mouse in drain(guest) if from_mouse)
    packets = [data[at : at + 3] for at in range(0, len(data), 3)]
    return [(one[0] & 7, one[1] - (one[0] << 4 & 256), one[2] - (one[0] << 3 & 256)) for one in packets]


def test_each_move_of_the_file_is_a_packet_of_its_own(pc, guest):
    assert done(pc, guest, "5,5 left") == []  # nobody has switched it on
    mouse(guest, 0xF4)
    assert done(pc, guest, "10,-20") == [(0, 10, 20)]
    assert done(pc, guest, "left +right 1,2 3,4 -right middle") == [
        (1, 0, 0), (0, 0, 0), (2, 0, 0), (2, 1, -2), (2, 3, -4), (0, 0, 0), (4, 0, 0), (0, 0, 0),
    ]  # fmt: skip
    assert done(pc, guest, "+left -300,0 -left") == [(1, 0, 0), (1, -255, 0), (1, -45, 0), (0, 0, 0)]
    assert done(pc, guest, "wheel-up") == []  # it has none yet
    mouse(guest, 0xF3, 200, 0xF3, 100, 0xF3, 80)
    pc.keyboard.move(moves.parse("wheel-up wheel-down"))
    assert bytes(byte for byte, _ in drain(guest)) == bytes((8, 0, 0, 0xFF, 8, 0, 0, 1))


def test_moves_that_wait(pc, guest):
    mouse(guest, 0xF4)
    pc.keyboard.move(moves.parse("1,0 " * 300))  # no packet is merged with another
    assert sum(byte == 1 for byte, _ in drain(guest)) == 300
    pc.keyboard.move(moves.parse("left " * 2048))
    with pytest.raises(WouldBlock, match="moves wait"):
        pc.keyboard.move(moves.parse("left left"))
    with pytest.raises(Invalid, match="no moves"):
        pc.keyboard.check_input("moves", b"\xff")
    pc.keyboard.reset()
    mouse(guest, 0xF4)
    assert drain(guest) == []


@pytest.mark.parametrize("text", ["", "left,", "1,2,3", "1.5,2", "up", "++left", "16385,0", "١,٢", "+wheel-up", "LEFT"])
def test_words_that_are_no_moves(text):
    with pytest.raises(Invalid, match="mouse: "):
        moves.parse(text)


def test_an_interrupt_finds_its_byte(pc, guest, monkeypatch):
    """The status that a CPU polls without Python is the new one before the interrupt comes, for it comes at once."""
    shown, found = [], []

    class Latch:
        show = staticmethod(shown.append)

    def set_irq(device, line, level):
        if level:
            found.append((line, shown[-1][1]))

    monkeypatch.setattr(pc.keyboard, "chip", Latch())
    monkeypatch.setattr(pc, "set_irq", set_irq)
    pc.keyboard.type(keys.parse("a"))
    assert found == [(1, status(guest))] and found[0][1] & (FULL | FROM_MOUSE) == FULL
    drain(guest)
    guest.out(0x64, 0x60)
    guest.out(0x60, 0x47)  # interrupts of both
    found.clear()
    guest.out(0x64, 0xD4)
    guest.out(0x60, 0xF4)
    assert found == [(12, status(guest))] and found[0][1] & (FULL | FROM_MOUSE) == FULL | FROM_MOUSE
