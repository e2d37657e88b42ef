"""Snapshots of a machine in its process: taken at any moment, gone back to, on each engine and across engines."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
from contextlib import ExitStack

import pytest
from engine.asm import ORIGIN, assemble
from engine.conftest import engine_or_skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.devices.virtio.block import Block
from vmfs.devices.virtio.disk import CLUSTER, SECTOR, Frozen, Overlay, open_disk
from vmfs.engine.base import Capability
from vmfs.machine.machine import Vm
from vmfs.machine.runloop import Bound
from vmfs.memory import ram
from vmfs.memory.layers import bits, extents, pages_of, runs
from vmfs.memory.ram import HIGH_START, PAGE, Memory
from vmfs.words.errors import AlreadyThere, Busy, LimitReached, NotThere
from vmfs.words.modes import set_mode
from vmfs.words.registers import write_registers

SECONDS = 60
SIZE = 4 << 20

# Writes all over a MiB, changes its own code, counts; exits now and then.
WALKER = """
l:  inc rbx; imul eax, ebx, 0x9e3779b1; and eax, 0xff; shl eax, 12; mov [rax + 0x100000], rbx; mov [rax + 0x100ff8], rcx
    mov byte ptr [rip + change + 1], bl; change: mov eax, 0; add rcx, rax
    rdtsc; lea rdi, [0x9000]; mov ecx, ebx; and ecx, 0x3f; mov esi, 0x8000; rep movsb
    test ebx, 31; jne l; out 0x80, al; in al, 0x81; add [0x7000], al; jmp l
"""


@pytest.fixture
def make():
    with ExitStack() as made:

        def one(engine, kind="bare", size=SIZE, cpus=1, source=WALKER):
            vm = Vm(engine, memory_size=size)
            made.callback(vm.close)
            if kind != "bare":
                vm.set_machine(kind)
                if Capability.DETERMINISTIC in vm.capabilities:
                    vm.set_time_source("instructions")
            vm.set_cpu_count(cpus)
            if Capability.DETERMINISTIC not in vm.capabilities:
                source = source.replace("rdtsc;", "")
            vm.memory.write(ORIGIN, assemble(source, "long").code)
            for cpu in vm.cpus:
                vm.change(lambda vcpu: set_mode(vcpu, vm.memory, SIZE, "long"), cpu=cpu.index)
                vm.change(
                    lambda vcpu, at=cpu.index: write_registers(vcpu, {"rip": ORIGIN, "rbx": at << 20}), cpu=cpu.index
                )
            return vm

        yield one


def ram_hash(vm):
    digest = hashlib.blake2b()
    for start, end in vm.memory.extents():
        for at in range(start, end, PAGE):
            if (page := vm.memory.read(at, PAGE)) != bytes(PAGE):
                digest.update(at.to_bytes(8, "little") + page)
    return digest.hexdigest()


def look(vm):
    """What it is. On KVM time goes on by itself; what follows it, and what PVM sets as it likes, is left out."""
    if Capability.DETERMINISTIC in vm.capabilities:
        return vm.state_hash()
    parts = vm.take().result(SECONDS).parts
    names = ("regs", "debugregs", "mp_state", "progress")
    return {"ram": ram_hash(vm), **{at: one.data.hex() for at, one in parts.items() if at.split("/")[-1] in names}}


def run(vm, count):
    """Somewhat, with exits answered."""
    bound = Bound(instructions=count) if Capability.BUDGET in vm.capabilities else Bound(steps=count % 50 + 1)
    exit_ = vm.start(bound).result(SECONDS)
    if getattr(exit_, "direction", "") == "in":
        vm.set_access_data(bytes([count & 0xFF]))
    return exit_.line()


# ---- there and back


@pytest.mark.parametrize("kind", ["bare", "pc"])
def test_there_and_back(engine, make, kind):
    vm = make(engine, kind)
    run(vm, 5000)
    before = look(vm)
    vm.past.take("one")
    assert look(vm) == before
    run(vm, 9021)
    then = look(vm)
    assert then != before
    for _ in range(3):
        vm.past.restore("one")
        assert look(vm) == before and vm.state == "paused"
        run(vm, 9021)
        assert look(vm) == then


def test_what_was_written_over_holes_is_there_when_the_kernel_has_dropped_clean_pages(engine, make, monkeypatch):
    """Before a page of a hole is written over it, the kernel reads it, and the file has it then. That is clean, and is
    dropped where memory is short: the files say no more what RAM is."""
    vm = make(engine)
    vm.past.take("one")
    there = [list(extents(layer.fd, 0, vm.memory.end)) for layer in vm.past["one"].ram.layers]
    run(vm, 9021)
    then, (first, count) = ram_hash(vm), max(runs(vm.written_since("base")), key=lambda run: run[1])
    assert (first * PAGE, (first + count) * PAGE) not in there[0]

    def dropped(fd, start, end):
        return ((max(at, start), min(to, end)) for at, to in there[0] if at < end and to > start)

    assert len(there) == 1
    monkeypatch.setattr(ram, "extents", dropped)
    assert ram_hash(vm) == then
    with vm.memory.view() as view:
        assert any(at <= first * PAGE and (first + count) * PAGE <= to for at, to in view.extents())
    vm.memory.clear(first * PAGE, count * PAGE)
    assert vm.memory.read(first * PAGE, count * PAGE) == bytes(count * PAGE)


def beside_one_left_alone(make, disturb):
    """Machines of some kinds run on as others that are left alone, whatever `disturb(vm, number, dice)` does between
    the runs; it gives the machine that goes on."""
    engine = engine_or_skip("emulator")
    for kind, cpus in (("bare", 1), ("pc", 1), ("bare", 4)):
        dice = random.Random(cpus)
        alone, vm = make(engine, kind, cpus=cpus), make(engine, kind, cpus=cpus)
        vm.put(alone.take().result(SECONDS))
        for number in range(12):
            count = dice.choice((1, 3, 100, 9000))
            assert run(alone, count) == run(vm, count)
            vm = disturb(vm, number, dice)
            assert vm.state_hash() == alone.state_hash(), (kind, number)


def test_a_machine_that_was_gone_back_with_runs_on_as_one_that_was_left_alone(make):
    def disturb(vm, number, dice):
        vm.past.take(f"s{number}")
        if number % 3 == 2:
            for _ in range(4):
                run(vm, dice.randrange(1, 20_000))
            vm.past.restore(f"s{dice.randrange(number)}")
            run(vm, dice.randrange(1, 20_000))
            vm.past.restore(f"s{number}")
        return vm

    beside_one_left_alone(make, disturb)


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.integers(1, 20_000)),
        st.tuples(st.just("write"), st.integers(0x120000, SIZE - 8)),
        st.tuples(st.just("clear"), st.integers(0x120000, SIZE - 8 * PAGE)),
        st.tuples(st.sampled_from(["take", "restore", "drop"]), st.integers(0, 4)),
        st.tuples(st.just("live"), st.integers(0, 4)),
        st.tuples(st.just("move"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=4,
    max_size=25,
)


def test_what_kvm_takes_of_a_cpu_that_has_not_run(make):
    """MSR_PLATFORM_INFO, which came from the other engine since the snapshot (Linux 6.14 and later: before a first run
    only)."""
    emulator, kvm = engine_or_skip("emulator"), engine_or_skip("kvm")
    vm = make(kvm)
    run(vm, 5)
    vm.past.take("before")
    before = look(vm)
    vm.move_to(emulator)
    vm.move_to(kvm)
    run(vm, 5)
    vm.past.restore("before")
    assert look(vm) == before
    run(vm, 5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS)
@pytest.mark.parametrize("kind", ["bare", "pc"])
def test_any_walk(engine, other, make, kind, acts):
    """What was taken is what is gone back to, whatever came in between; and the same comes of the same."""
    vm = make(engine, kind)
    kept, after = {}, {}  # what it was, and what came of one more run
    came_from = None
    for act, value in acts:
        if act == "run":
            line = run(vm, value)
            if came_from is not None and Capability.DETERMINISTIC in vm.capabilities:
                assert after.setdefault((came_from, value), (line, look(vm))) == (line, look(vm))
        elif act == "write":
            vm.memory.write(value, b"eight by")
        elif act == "clear":
            vm.memory.clear(value, 5 * PAGE)
        elif act in ("take", "live") and str(value) not in kept:
            kept[str(value)] = look(vm), vm.engine.name
            vm.past.take(str(value), is_live=act == "live")
            assert look(vm) == kept[str(value)][0]
        elif act == "restore" and str(value) in kept:
            vm.past.restore(str(value))
            assert (look(vm), vm.engine.name) == kept[str(value)]
        elif act == "drop" and str(value) in kept:
            vm.past.drop(str(value))
            del kept[str(value)]
            after = {key: found for key, found in after.items() if key[0] != str(value)}
        elif act == "move":
            vm.move_to(other if vm.engine is engine else engine)
            if Capability.DETERMINISTIC in vm.capabilities:
                vm.set_time_source("instructions")
        elif act == "reset":
            vm.reset()
        came_from = str(value) if act == "restore" and str(value) in kept else None
    for name, was in kept.items():
        vm.past.restore(name)
        assert (look(vm), vm.engine.name) == was
    assert vm.past.names() == list(kept)


@pytest.mark.parametrize("is_live", [False, True])
def test_while_it_runs(engine, make, is_live):
    """The guest writes the same number to many pages, in order: what is kept is of one moment."""
    source = "l: inc rax; mov edi, 0x100000; mov ecx, 200; 1: mov [rdi], rax; add rdi, 4096; dec ecx; jnz 1b; jmp l"
    vm = make(engine, source=source)
    going = vm.start()
    while vm.memory.read(0x100000, 8) < b"\3":
        pass
    for number in range(8):
        vm.past.take(f"s{number}", is_live=is_live)
    assert not going.done(), going.result().line()
    with pytest.raises(Busy):
        vm.past.restore("s0")
    vm.stop()
    going.result(SECONDS)
    values = []
    for number in range(8):
        vm.past.restore(f"s{number}")
        found = [int.from_bytes(vm.memory.read(0x100000 + at * PAGE, 8), "little") for at in range(200)]
        assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1, number
        values.append(found[0])
        rax = int.from_bytes(vm.cpu.vcpu.get_state("regs")[:8], "little")
        assert rax - found[0] in (0, 1)  # the registers are of that moment, too
        assert vm.last_exit is None and vm.state == "paused"
        vm.start(Bound(seconds=0.01)).result(SECONDS)
        assert int.from_bytes(vm.memory.read(0x100000, 8), "little") >= found[0]
    assert values == sorted(values) and values[-1] > 0


# ---- memory


def test_a_base_is_written_by_nobody_and_shared(engine, make):
    vm = make(engine, size=64 << 20)
    vm.memory.write(16 << 20, os.urandom(1 << 20) * 8)
    fd = vm.memory.fd
    vm.past.take("one")
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 16 << 20)
    with pytest.raises(OSError):
        os.ftruncate(fd, 0)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    (base,) = vm.past["one"].ram.layers
    taken = base.taken
    for number in range(20):
        vm.memory.write((16 + number) << 20, bytes([number]) * 8)
        vm.past.take(f"more{number}")
    layers = {layer for name in vm.past.names() for layer in vm.past[name].ram.layers}
    assert sum(layer.taken for layer in layers) - taken <= 20 * 32 * 1024
    assert all(fcntl.fcntl(layer.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE for layer in layers)
    shared, own = vm.past.sizes(vm.past["more19"])
    assert shared >= taken and 0 < own <= 32 * 1024


def test_pages_that_nobody_touched_stay_so(engine, make):
    size = HIGH_START + (64 << 20)
    vm = make(engine, size=size)
    high = vm.memory.end - PAGE
    vm.memory.write(high, b"at the end")
    vm.past.take("one")
    assert vm.memory.read(high, 10) == b"at the end"
    for at in (0x1000000, 0x20000000, HIGH_START + 0x5000):
        assert vm.memory.read(at, 1 << 20) == bytes(1 << 20)
    vm.memory.write(high, b"over it   ")
    vm.memory.write(0x20000000, b"new")
    assert vm.memory.read(0x20000000 - 4, 16) == b"\0\0\0\0new".ljust(16, b"\0")
    vm.past.take("two")
    vm.past.restore("one")
    assert vm.memory.read(high, 10) == b"at the end" and vm.memory.read(0x20000000, 3) == bytes(3)
    vm.past.restore("two")
    assert vm.memory.read(high, 10) == b"over it   " and vm.memory.read(0x20000000, 3) == b"new"
    assert vm.past["two"].ram.read(0x20000000 - 1, 5) == b"\0new\0"
    with vm.memory.view() as view:
        assert view.read(high, 10) == b"over it   " and view.read(0x40000000, PAGE) == bytes(PAGE)
    assert vm.memory.blocks * 512 < 16 << 20


def test_memory_by_address(engine, make):
    """Engine, devices and this program see one memory, over a base as before; the dirty log goes on."""
    vm = make(engine, "pc", source="l: mov rax, [0x8000]; inc rax; mov [0x8008], rax; mov [0x9000], rax; jmp l")
    vm.past.take("one")
    vm.take_dirty("file")
    vm.board.dma_write(0x8000, (41).to_bytes(8, "little"))
    vm.start(Bound(seconds=0.05)).result(SECONDS)
    assert vm.board.dma_read(0x8008, 8) == vm.memory.read(0x9000, 8) == (42).to_bytes(8, "little")
    assert int.from_bytes(vm.take_dirty("file"), "little") & 0x300 == 0x300
    ram = vm.board.ram
    vm.close()
    assert ram[0x8008] == 0  # the last view unmaps it; what was in it is gone


def test_clients_that_write_unseen(engine, make):
    """RAM that has to stay its memfd is copied, and looked through where somebody may have written it."""
    vm = make(engine)
    vm.past.take("one", is_live=True)
    assert vm.memory.base is None
    before = ram_hash(vm)
    os.pwrite(vm.memory.fd, b"from a client", 0x200000)
    with_it = ram_hash(vm)
    vm.past.take("two", is_live=True, unseen=lambda: -1)
    assert len(vm.past["two"].ram.layers) == 2  # what is equal is shared
    os.pwrite(vm.memory.fd, b"from another", 0x300000)
    vm.past.restore("two", unseen=lambda: -1)
    assert ram_hash(vm) == with_it
    vm.past.restore("one", unseen=lambda: -1)
    assert ram_hash(vm) == before
    vm.past.restore("two", unseen=lambda: 5)  # nobody has it open now, but somebody had
    assert ram_hash(vm) == with_it
    vm.past.take("three", unseen=lambda: 5)
    assert vm.memory.base is not None
    vm.past.restore("one")
    assert ram_hash(vm) == before


def test_a_page_that_the_file_of_the_base_has_dropped_is_touched_all_the_same(make, monkeypatch):
    """The kernel reads a hole of the base before it makes a private copy, and may drop what it read from the file."""
    vm = make(engine_or_skip("emulator"), "pc")
    vm.past.take("one")
    before, page = ram_hash(vm), 0x3F0000
    vm.change(lambda vcpu: write_registers(vcpu, {"rax": 0x5A, "rdi": page}))
    vm.memory.write(ORIGIN, assemble("mov [rdi], rax; l: jmp l", "long").code)
    vm.start(Bound(instructions=5)).result(SECONDS)
    vm.past.take("two")  # which asks the engine what was written
    whole = ram.extents
    monkeypatch.setattr(ram, "extents", lambda fd, start, end: (
        (at, stop) for at, stop in whole(fd, start, end) if not at <= page < stop))  # fmt: skip
    assert any(at <= page < stop for at, stop in vm.memory.extents()) and ram_hash(vm) != before
    vm.memory.noted = lambda: 0
    assert not any(at <= page < stop for at, stop in vm.memory.extents())  # so it is that by which it is known


# ---- disks, images


def with_disk(vm, tmp_path, mode="cow"):
    image = tmp_path / "disk"
    if not image.exists():
        image.write_bytes(random.Random(1).randbytes(1 << 20))
    disk = open_disk(os.open(image, os.O_RDWR if mode == "rw" else os.O_RDONLY), mode)
    vm.attach(lambda board: Block(board, f"blk{board.pci.free_slot()}", board.pci.free_slot(), disk))
    return disk


def test_disks_that_are_cow(make, tmp_path):
    vm = make(engine_or_skip("emulator"), "pc")
    disk = with_disk(vm, tmp_path)
    model, kept, dice = bytearray(random.Random(1).randbytes(1 << 20)), {}, random.Random(2)
    for number in range(120):
        at, size = dice.randrange(0, 2000) * SECTOR, dice.randrange(1, 20) * SECTOR
        if (what := dice.random()) < 0.5:
            data = dice.randbytes(size)
            disk.write(at, [memoryview(data)])
            model[at : at + size] = data
        elif what < 0.6:
            disk.discard(at, size)
            model[at : at + size] = bytes(size)
        elif what < 0.8:
            vm.past.take(str(number))
            kept[str(number)] = bytes(model), vm.state_hash()
        elif kept:
            name = dice.choice(list(kept))
            vm.past.restore(name)
            model = bytearray(kept[name][0])
            assert vm.state_hash() == kept[name][1]
            if dice.random() < 0.4:
                vm.past.drop(name)
                del kept[name]
        assert disk.read_at(0, disk.size) == model, number
    assert len(kept) > 5 and len(disk.lower) > 1


def test_room_for_an_overlay_is_given_back(tmp_path):
    held = 0

    class Room:
        def reserve(self, size):
            nonlocal held
            held += size

        def release(self, size):
            nonlocal held
            held -= size

    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    disk = open_disk(os.open(image, os.O_RDONLY), "cow", room=Room())
    assert isinstance(disk, Overlay)
    disk.write(0, [memoryview(bytes(CLUSTER))])
    empty = disk.freeze(disk.new_file)
    kept, before_any = empty, Frozen((), disk.size)
    assert list(kept.extents()) == [(0, CLUSTER)] and kept.read_at(0, 99999999) == bytes(1 << 20)
    disk.write(0, [memoryview(bytes(CLUSTER))])
    before = held
    disk.go_back(kept)
    assert 0 < held < before
    disk.go_back(before_any)
    del kept, empty
    assert held == 0
    disk.close()


def test_what_is_booted(engine, make):
    vm = make(engine)
    vm.images["kernel"].write(0, b"a kernel")
    vm.images.cmdline = "quiet"
    vm.past.take("one")
    vm.images["kernel"].write(2, b"other")
    vm.images["initrd"].write(0, b"an initrd")
    vm.images.cmdline = "loud"
    assert vm.images["kernel"].read(0, 99) == b"a other" + b"l"
    vm.past.take("two")
    vm.past.restore("one")
    assert vm.images["kernel"].read(0, 99) == b"a kernel" and not vm.images.there("initrd")
    assert vm.images.cmdline == "quiet"
    vm.past.restore("two")
    assert vm.images["initrd"].read(0, 99) == b"an initrd" and vm.images.cmdline == "loud"


# ---- what cannot be


def test_names_and_numbers(engine, make):
    vm = make(engine)
    vm.past.take("one")
    with pytest.raises(AlreadyThere):
        vm.past.take("one")
    for act in (vm.past.restore, vm.past.drop):
        with pytest.raises(NotThere):
            act("two")
    vm.past.drop("one")
    assert vm.past.names() == []


def test_what_it_is_made_of_is_fixed_while_there_are_snapshots(engine, make):
    vm = Vm(engine, memory_size=SIZE)
    try:
        vm.past.take("one")
        for change in (
            lambda: vm.set_cpu_count(2), lambda: vm.set_machine("pc"), lambda: vm.resize_memory(2 * SIZE),
        ):  # fmt: skip
            with pytest.raises(Busy, match="snapshots"):
                change()
        vm.past.restore("one")
        vm.past.drop("one")
        vm.set_cpu_count(2)
    finally:
        vm.close()


@pytest.mark.parametrize("room", [0, SIZE, SIZE + (1 << 20)])
def test_without_room_nothing_is_kept(engine, make, room):
    vm = make(engine)
    held = 0

    def reserve(more):
        nonlocal held
        if more > 0 and held + more > room:
            raise LimitReached("no more")
        held += more

    before = look(vm)
    names = []
    try:
        for number in range(9):
            vm.memory.write(0x100000, os.urandom(PAGE) * 300)
            before = look(vm)
            vm.past.take(str(number), reserve=reserve)
            names.append(str(number))
    except LimitReached:
        pass
    else:
        pytest.fail("it has no bound")
    assert vm.past.names() == names and look(vm) == before and held <= room
    for name in names:
        vm.past.drop(name)
    assert held <= SIZE + (1 << 20)  # a base is what RAM is over
    assert look(vm) == before
    vm.past.take("again", reserve=lambda more: None)
    run(vm, 1000)
    vm.past.restore("again")
    assert look(vm) == before


# ---- bitmaps


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), max_size=8))
def test_runs(spans):
    pages = 0
    for first, count in spans:
        pages |= bits(first, count)
    found = list(runs(pages))
    assert sum(bits(first, count) for first, count in found) == pages
    assert all(a + n < b for (a, n), (b, _) in zip(found, found[1:], strict=False))


def test_pages_of():
    assert pages_of(0, 0) == 0 and pages_of(4095, 2) == 3 and pages_of(4096, 4096) == 2


def test_an_image_of_layers():
    memory = Memory(1 << 20)
    try:
        memory.write(0, b"base")
        memory.become_private()
        image = memory.base
        memory.write(0x3000, b"over")
        assert image.read(0, 4) == b"base" and image.read(0x3000, 4) == bytes(4)
        assert image.read(1 << 20, 4) == b"" and image.differs(image) == 0
        memory.put(bits(0, 256), image)
        assert memory.read(0x3000, 4) == bytes(4)
    finally:
        memory.close()


def test_time_that_passed_before_a_machine_counts_by_instructions(make):
    """What its clock had not looked at yet is in its state as any other time, and the state can be gone back to."""
    vm = Vm(engine_or_skip("emulator"), memory_size=SIZE)
    try:
        vm.set_machine("pc")
        vm.engine_machine.set_state("clock", (5_400_000_000).to_bytes(8, "little").ljust(48, b"\0"))
        vm.set_time_source("instructions")
        vm.past.take("one")
        before = vm.state_hash()
        vm.past.restore("one")
        assert vm.state_hash() == before
    finally:
        vm.close()


# Maps another page at 2 MiB, after the snapshot, and reads before and after it.
MAPPER = """
    mov rax, cr3; mov rax, [rax]; shr rax, 12; shl rax, 12; mov rax, [rax]; shr rax, 12; shl rax, 12; out 0x80, al
l:  mov rbx, [0x200000]; mov qword ptr [rax + 8], 0x83; invlpg [0x200000]; mov rcx, [0x200000]; out 0x81, al; jmp l
"""


def test_what_a_guest_has_mapped_since_is_mapped_no_more(engine, make):
    vm = make(engine, source=MAPPER)
    vm.memory.write(0x200000, b"old page")
    vm.memory.write(0, b"new page")
    vm.start().result(SECONDS)
    vm.past.take("before")
    for _ in range(3):
        vm.start().result(SECONDS)
        regs = vm.at_boundary(lambda cpu: cpu.get_state("regs")).result(SECONDS)
        assert regs[8:24] == b"old pagenew page"
        vm.past.restore("before")
