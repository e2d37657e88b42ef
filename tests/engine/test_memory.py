"""Memory slots, the dirty log, read-only memory; and that nothing is left behind."""

import os

import pytest
from engine.asm import ORIGIN
from engine.machine import RAM, Ram, machine_on

from vmfs.words import exits
from vmfs.words.errors import EngineFailed, Invalid, VmfsError

PAGE = 4096
HIGH = 0x100000  # after the RAM of the test machine


@pytest.fixture
def extra():
    ram = Ram(16 * PAGE)
    yield ram
    ram.close()


def dirty_pages(log):
    return [page for page in range(8 * len(log)) if log[page // 8] & 1 << page % 8]


def test_both_sides_see_one_memory(vm, assembler):
    vm.load(
        assembler("mov rax, [0x3000]; mov [0x3008], rax; out 0x80, al; mov rax, [0x3000]; hlt", "long"),
        "long",
    )
    vm.ram.write(0x3000, b"written!")
    vm.vcpu.run()
    assert vm.ram.read(0x3008, 8) == b"written!"
    vm.ram.write(0x3000, b"\x11\0\0\0\0\0\0\0")
    vm.vcpu.run()
    assert vm.regs()["rax"] == 0x11


def test_dirty_log(vm, assembler):
    """What the guest wrote since the last call, and not what is written from outside."""
    code = "mov [0x8000], al; mov [0x9fff], ax; hlt; mov al, [0x10000]; mov [0x20000], al; hlt"
    vm.load(assembler(code, "protected"), "protected")
    vm.machine.dirty_log(0)
    vm.vcpu.run()
    log = vm.machine.dirty_log(0)
    assert len(log) == RAM // PAGE // 8
    assert dirty_pages(log) == [0x8, 0x9, 0xA]
    assert dirty_pages(vm.machine.dirty_log(0)) == []
    vm.ram.write(0x30000, b"outside")
    vm.vcpu.run()
    assert dirty_pages(vm.machine.dirty_log(0)) == [0x20]
    with pytest.raises(Invalid):
        vm.machine.dirty_log(1)


def test_dirty_log_of_user_mode(vm, assembler, divergences):
    vm.load(assembler("mov [0x8000], al; mov [0x40000], al; out 0x80, al", "user"), "user")
    vm.machine.dirty_log(0)
    vm.vcpu.run()
    pages = dirty_pages(vm.machine.dirty_log(0))
    table = vm.vcpu.get_state("sregs")[240:248]  # cr3: the CPU sets accessed and dirty bits in the tables
    tables = range(int.from_bytes(table, "little") // PAGE, RAM // PAGE)
    code = [ORIGIN // PAGE] if "pvm-dirty-log-has-code" in divergences else []
    assert [page for page in pages if page not in tables] == [*code, 0x8, 0x40]


def test_dirty_log_of_an_odd_number_of_pages(vm, extra, assembler):
    vm.machine.map_memory(3, HIGH, extra.fd, 0, 9 * PAGE)
    vm.load(assembler(f"mov [{HIGH + 8 * PAGE:#x}], al; hlt", "protected"), "protected")
    vm.vcpu.run()
    log = vm.machine.dirty_log(3)
    assert len(log) == 2
    assert dirty_pages(log) == [8]


def test_slot_at_an_offset(vm, extra, assembler):
    vm.machine.map_memory(1, HIGH, extra.fd, 4 * PAGE, 2 * PAGE)
    vm.load(
        assembler(
            f"mov eax, [{HIGH:#x}]; mov [{HIGH + PAGE:#x}], eax; hlt; mov ebx, [{HIGH + 2 * PAGE:#x}]; hlt",
            "protected",
        ),
        "protected",
    )
    extra.write(4 * PAGE, b"abcd")
    assert vm.vcpu.run().REASON == "hlt"
    assert extra.read(5 * PAGE, 4) == b"abcd"
    assert isinstance(vm.vcpu.run(), exits.Mmio)  # after the slot


def test_slots_are_replaced_and_removed(vm, extra, assembler):
    vm.load(assembler(f"again: mov eax, [{HIGH:#x}]; hlt; jmp again", "protected"), "protected")
    extra.write(0, b"zero")
    extra.write(PAGE, b"one!")

    def loaded():
        exit_ = vm.vcpu.run()
        if isinstance(exit_, exits.Mmio):
            vm.vcpu.access_data = b"mmio"
            exit_ = vm.vcpu.run()
        assert exit_.REASON == "hlt"
        return vm.regs()["rax"].to_bytes(4, "little")

    assert loaded() == b"mmio"
    vm.machine.map_memory(1, HIGH, extra.fd, 0, PAGE)
    assert loaded() == b"zero"
    vm.machine.map_memory(1, HIGH, extra.fd, PAGE, PAGE)
    assert loaded() == b"one!"
    vm.machine.map_memory(1, HIGH, extra.fd, 0, 2 * PAGE)  # another size
    assert loaded() == b"zero"
    vm.machine.map_memory(1, HIGH + PAGE, extra.fd, 0, PAGE)  # another place
    assert loaded() == b"mmio"
    vm.machine.map_memory(1, 0, extra.fd, 0, 0)
    assert loaded() == b"mmio"
    vm.machine.map_memory(1, 0, extra.fd, 0, 0)  # removing what is not there is no error
    vm.machine.map_memory(1, HIGH, extra.fd, PAGE, PAGE, read_only=True)
    assert loaded() == b"one!"


def test_a_refused_slot_leaves_the_old_one(vm, extra, assembler):
    vm.load(assembler(f"again: mov eax, [{HIGH:#x}]; hlt; jmp again", "protected"), "protected")
    vm.machine.map_memory(1, HIGH, extra.fd, 0, PAGE)
    extra.write(0, b"kept")
    for arguments in (
        (1, HIGH + 1, extra.fd, 0, PAGE),
        (1, HIGH, extra.fd, 1, PAGE),
        (1, HIGH, extra.fd, 0, PAGE + 1),
        (1, HIGH, extra.fd, 0, 17 * PAGE),  # after the end of the file
        (1, HIGH, extra.fd, -PAGE, PAGE),
        (1, -PAGE, extra.fd, 0, PAGE),
        (1, 0, extra.fd, 0, PAGE),  # over slot 0
        (1, 1 << 60, extra.fd, 0, PAGE),
        (-1, HIGH, extra.fd, 0, PAGE),
        (1 << 20, 2 * HIGH, extra.fd, 0, PAGE),
    ):
        with pytest.raises(Invalid):
            vm.machine.map_memory(*arguments)
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"].to_bytes(4, "little") == b"kept"


def test_many_slots(vm, assembler):
    """Every second page of 1 MiB is a slot of its own; the guest finds each, and what is between."""
    slots = 128
    ram = Ram(slots * PAGE)
    try:
        for slot in range(slots):
            vm.machine.map_memory(1 + slot, HIGH + 2 * slot * PAGE, ram.fd, slot * PAGE, PAGE)
            ram.write(slot * PAGE, (slot + 1).to_bytes(4, "little"))
        vm.load(
            assembler(
                f"mov esi, {HIGH:#x}; xor eax, eax; mov ecx, {slots};"
                f"again: add eax, [esi]; mov [esi + 4], eax; add esi, {2 * PAGE}; loop again;"
                f"mov al, [esi - {PAGE}]",
                "protected",
            ),
            "protected",
        )
        exit_ = vm.vcpu.run()
        assert isinstance(exit_, exits.Mmio) and exit_.addr == HIGH + (2 * slots - 1) * PAGE
        assert vm.regs()["rax"] == slots * (slots + 1) // 2
        assert ram.read((slots - 1) * PAGE + 4, 4) == vm.regs()["rax"].to_bytes(4, "little")
        assert dirty_pages(vm.machine.dirty_log(slots)) == [0]
    finally:
        ram.close()


def test_writes_to_read_only_memory_are_exits(vm, extra, assembler):
    vm.machine.map_memory(1, HIGH, extra.fd, 0, PAGE, read_only=True)
    extra.write(0, b"rom!")
    program = assembler(f"mov eax, [{HIGH:#x}]; mov byte ptr [{HIGH + 1:#x}], 0x5a; l1: hlt", "protected")
    vm.load(program, "protected")
    assert vm.vcpu.run().line() == (
        f"mmio direction=write addr={HIGH + 1:#x} size=1 data=0x5a rip={program.labels['l1']:#x}"
    )
    assert vm.regs()["rax"].to_bytes(4, "little") == b"rom!"
    assert extra.read(0, 4) == b"rom!"
    assert vm.vcpu.run().REASON == "hlt"


def test_code_runs_from_read_only_memory(vm, extra, assembler):
    vm.machine.map_memory(1, HIGH, extra.fd, 0, PAGE, read_only=True)
    extra.write(0, assembler("mov eax, 0x42; hlt", "protected").code)
    vm.load(assembler("nop", "protected"), "protected")
    vm.set_regs(rip=HIGH)
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"] == 0x42


def test_code_that_was_written_over_is_the_new_code(vm, assembler):
    """By the guest, and from outside between two runs."""
    vm.load(
        assembler("mov byte ptr [rip + target + 1], 7; target: mov eax, 1; hlt; jmp target", "long"), "long"
    )
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"] == 7
    target = assembler(
        "mov byte ptr [rip + target + 1], 7; target: mov eax, 1; hlt; jmp target", "long"
    ).labels
    vm.ram.write(target["target"] + 1, b"\x09")
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"] == 9


def test_execution_where_there_is_no_memory_is_an_error(vm, assembler):
    vm.load(assembler("nop", "long"), "long")
    vm.set_regs(rip=0x200000)
    exit_ = vm.vcpu.run()
    assert exit_.REASON == "error"
    assert exit_.rip == 0x200000
    assert exit_.reason


def test_cpus(vm):
    other = vm.machine.create_vcpu(1)
    assert other.index == 1
    for index in (0, 1, -1, 1 << 20):
        with pytest.raises(VmfsError):
            vm.machine.create_vcpu(index)


def open_files():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd))


def _exists(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd:vmfs-test" in line or "kvm" in line for line in file)


def test_nothing_is_left_behind(engine, assembler):
    program = assembler("again: out 0x80, al; jmp again", "long")
    before, mapped = open_files(), mappings()
    for number in range(200):
        with machine_on(engine) as vm:
            if number % 20 == 0:
                vm.load(program, "long")
                vm.vcpu.run()
            vm.machine.close()
            vm.machine.close()
    assert open_files() == before
    assert mappings() == mapped


def test_a_closed_machine_says_so(engine):
    with machine_on(engine) as vm:
        vm.machine.close()
        with pytest.raises(EngineFailed):
            vm.machine.get_state("clock")
        with pytest.raises(VmfsError):
            vm.machine.create_vcpu(5)
        with pytest.raises(EngineFailed):
            vm.vcpu.run()


def test_machines_are_apart(engine, assembler):
    program = assembler("mov eax, [0x3000]; hlt", "long")
    with machine_on(engine) as one, machine_on(engine) as two:
        for vm, text in ((one, b"one!"), (two, b"two!")):
            vm.load(program, "long")
            vm.ram.write(0x3000, text)
        for vm, text in ((two, b"two!"), (one, b"one!")):
            assert vm.vcpu.run().rip == ORIGIN + len(program.code)
            assert vm.regs()["rax"].to_bytes(4, "little") == text
