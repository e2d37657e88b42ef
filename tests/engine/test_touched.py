"""A restore leaves alone the devices that nobody has touched. Whatever a guest, a user or the time does to a device,
the machine is afterwards what it was: its whole state is compared with the snapshot's."""

from __future__ import annotations

import os
import random

import pytest
from engine.asm import ORIGIN, assemble
from engine.conftest import engine_or_skip
from engine.test_past import make, ram_hash, with_disk  # noqa: F401

from vmfs.devices.board import Board
from vmfs.devices.ide.ata import AtaDisk
from vmfs.devices.virtio.disk import open_disk
from vmfs.machine.runloop import Bound
from vmfs.words.registers import write_registers

SECONDS = 60
BUILT_IN = (
    "bridge", "com1", "com2", "com3", "com4", "rtc", "dma", "power", "vmgenid", "keyboard", "fw-cfg", "debugcon",
    "debugcon2", "debug-exit", "isa-bridge", "power-pci", "display", "hpet", "pci", "lpt1",
    "speaker", "smbus",
)  # fmt: skip
# Of them, those that are more than their configuration space, which the bridge's ports reach, and have a state.
STATEFUL = {
    "com1", "com2", "com3", "com4", "rtc", "dma", "power", "keyboard", "fw-cfg", "display", "pci", "hpet", "lpt1",
    "smbus",
}  # fmt: skip

# Whether it writes; what does so with AL, and with EAX: at port DX, or at RDX.
IN_AND_OUT = {
    ("port", True): (b"\xee", b"\xef"),
    ("port", False): (b"\xec", b"\xed"),
    ("memory", True): (b"\x88\x02", b"\x89\x02"),
    ("memory", False): (b"\x8a\x02", b"\x8b\x02"),
}


@pytest.fixture
def how(monkeypatch):
    """For each time that the devices were put: whether all were looked at."""
    made, put_all, put_touched = [], Board._put_all, Board._put_touched

    def all_of_them(*arguments):
        made.append(True)
        put_all(*arguments)

    def those(*arguments):
        made.append(False)
        put_touched(*arguments)

    monkeypatch.setattr(Board, "_put_all", all_of_them)
    monkeypatch.setattr(Board, "_put_touched", those)
    return made


def accesses(windows, dice):
    """Code that reads and writes the windows here and there: few times, so that now and then all of it is in C."""
    code = b""
    for _ in range(dice.randrange(1, 6)):
        window, size = dice.choice(windows), dice.choice((1, 1, 1, 2, 4))
        at = window.start + dice.randrange(min(window.length, 0x2000)) // size * size
        value = dice.choice((0, 1, 3, 0x80, dice.getrandbits(32)))
        code += b"\xb8" + value.to_bytes(4, "little") + b"\x48\xba" + at.to_bytes(8, "little")  # mov eax; mov rdx
        byte, more = IN_AND_OUT[window.space, dice.random() < 0.6]
        code += {1: byte, 2: b"\x66" + more, 4: more}[size]
    return code + b"\xf4"


def begin(vm):
    vm.change(lambda cpu: write_registers(cpu, {"rip": ORIGIN}))
    vm.past.take("one")
    vm.past.restore("one")  # by now it is known what all devices are


def run(vm, code):
    vm.memory.write(ORIGIN, code)
    vm.start(Bound(instructions=2000)).result(SECONDS)


def parts(vm):
    return {**vm.take().result(SECONDS).parts, "ram": ram_hash(vm)}


def back(vm):
    assert vm.past.restore_now("one", 1 << 20)


@pytest.mark.parametrize("name", [*BUILT_IN, "hda", "blk5"])
def test_each_device_that_a_guest_uses_is_put_back(make, how, tmp_path, name):  # noqa: F811
    vm, dice = make(engine_or_skip("emulator"), "pc", size=64 << 20), random.Random(name)
    if name == "blk5":
        with_disk(vm, tmp_path)
        name = next(name for name in vm.board.devices if name.startswith("blk"))
    elif name == "hda":
        (tmp_path / "disk").write_bytes(dice.randbytes(1 << 20))
        disk = open_disk(os.open(tmp_path / "disk", os.O_RDONLY), "cow")
        vm.attach(lambda board: AtaDisk(board, "hda", disk))
        name = "ide"
    begin(vm)
    then, windows, changed = parts(vm), vm.board.devices[name].windows(), 0
    for number in range(60 if windows else 0):
        run(vm, accesses(windows, dice))
        if number % 2:  # else nobody looks at the device, which touches it
            changed += parts(vm).get(f"device/{name}") != then.get(f"device/{name}")
        back(vm)
        assert parts(vm) == then
        back(vm)  # to look has touched some
    assert changed or name not in STATEFUL
    if name.startswith(("com", "debug", "rtc")):
        assert False in how  # what is in C


def test_each_device_of_a_pc_is_here(make):  # noqa: F811
    assert make(engine_or_skip("emulator"), "pc").board.built_in == set(BUILT_IN)


def test_what_a_function_has_in_its_configuration_space_is_put_back(make, how):  # noqa: F811
    """By the bridge's ports, which are another device's."""
    vm = make(engine_or_skip("emulator"), "pc")
    begin(vm)
    then, function = parts(vm), vm.board.display
    address = 0x80000000 | function.place << 8 | 0x3C  # the interrupt line: no more than a byte
    how.clear()
    code = f"mov edx, 0xcf8; mov eax, {address}; out dx, eax; mov dl, 0xfc; mov al, 77; out dx, al; hlt"
    run(vm, assemble(code, "long").code)
    assert function.config[0x3C] == 77
    back(vm)
    assert how == [False] and parts(vm) == then


def test_what_a_guest_writes_into_the_framebuffer_is_put_back(make, how):  # noqa: F811
    vm = make(engine_or_skip("emulator"), "pc")
    begin(vm)
    then, start = parts(vm), vm.board.display.bar(0)
    how.clear()
    for offset in (0, 12345, (8 << 20) + 7):
        run(vm, assemble(f"mov rdx, {start + offset}; mov byte ptr [rdx], 99; hlt", "long").code)
        assert parts(vm)["device/display"] != then["device/display"]
        back(vm)
        assert parts(vm) == then
    assert how == [False] * 3


def test_what_a_client_writes_into_the_framebuffer_is_put_back(make):  # noqa: F811
    vm = make(engine_or_skip("emulator"), "pc")
    begin(vm)
    then, fd = parts(vm), vm.board.display.framebuffer
    os.pwrite(fd, b"picture", 70000)
    back(vm)
    assert parts(vm) == then


@pytest.mark.parametrize(
    "use",
    [
        lambda board: board.devices["com1"].receive(b"hello"),
        lambda board: board.devices["power"].press_button(),
        lambda board: board.keyboard.move_mouse(3, 4, 0, 1),
        lambda board: board.renew(),
        lambda board: board.set_irq(board.devices["com1"], 4, True),
        lambda board: board.devices["rtc"].set_clock(10**18),
        lambda board: board.reset(),
        lambda board: board.random(4),
    ],
)
def test_what_a_user_does_is_put_back(make, use):  # noqa: F811
    vm = make(engine_or_skip("emulator"), "pc")
    begin(vm)
    then = parts(vm)
    with vm.board.lock:
        use(vm.board)
    back(vm)
    assert parts(vm) == then


def test_a_copy_that_is_renewed_is_put_back(make, how):  # noqa: F811
    """At the host's time each restore gives the machine another generation ID, and raises an event."""
    vm = make(engine_or_skip("emulator"), "pc")
    vm.set_time_source("host")
    begin(vm)
    ids, names = set(), ("device/power", "device/vmgenid")
    then = {name: one for name, one in parts(vm).items() if name.startswith("device/") and name not in names}
    how.clear()
    for _ in range(4):
        run(vm, assemble("hlt", "long").code)
        back(vm)
        now = parts(vm)
        ids.add(now["device/vmgenid"].data)
        assert {name: now[name] for name in then if name != "device/rtc"} == {
            name: one for name, one in then.items() if name != "device/rtc"
        }
    assert len(ids) == 4 and how == [False] * 4


def test_what_is_forgotten_is_seen_here(make):  # noqa: F811
    """Where nobody had said that a device was used it would stay as it is, and these tests would tell."""
    vm = make(engine_or_skip("emulator"), "pc")
    begin(vm)
    then = parts(vm)
    run(vm, assemble("mov edx, 0x3ff; mov al, 77; out dx, al; hlt", "long").code)
    vm.board.bus.forget_touched()
    back(vm)
    assert parts(vm) != then


def test_a_clock_whose_alarm_is_on_stays_where_it_is(make):  # noqa: F811
    vm = make(engine_or_skip("emulator"), "pc")
    with vm.board.lock:
        for index, value in ((0x05, 0xC0), (0x03, 0xC0), (0x01, 0x30), (0x0B, 0x22)):  # at second 30 of any minute; AIE
            for offset, byte in enumerate((index, value)):
                vm.board.devices["rtc"].write(0, offset, 1, byte)
        before = vm.board.devices["rtc"].pack()
    vm.past.take("two")
    vm.past.restore("two")
    vm.past.restore("two")
    assert vm.board.devices["rtc"].pack() == before
