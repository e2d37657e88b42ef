"""State as bytes: round trips, what is refused and then changes nothing, and what the guest makes of it."""

import struct

import pytest
from engine.asm import ORIGIN
from engine.machine import MMIO, machine_on

from vmfs.engine.base import MACHINE_STATES, VCPU_STATES
from vmfs.words.errors import EngineFailed, Invalid, Unsupported
from vmfs.words.registers import has_avx, read_register, write_registers

_TSC, _TSC_ADJUST, _SYSENTER_CS, _EFER, _LSTAR = 0x10, 0x3B, 0x174, 0xC0000080, 0xC0000082
# Time goes on between two reads: the time stamp counter, and KVM's clocks.
_CLOCKS = {_TSC, _TSC_ADJUST, 0x6E0}
# struct kvm_sregs (arch/x86/include/uapi/asm/kvm.h)
_CR0, _CR3, _CR4, _CR8, _EFER_AT, _APIC_BASE = 224, 240, 248, 256, 264, 272
# struct kvm_fpu
_FCW, _XMM, _MXCSR = 128, 152, 408


def msrs_of(data):
    count = struct.unpack_from("<I", data)[0]
    assert len(data) == 8 + 16 * count
    entries = struct.iter_unpack("<IIQ", data[8:])
    return {index: value for index, _reserved, value in entries}


def pack_msrs(entries):
    body = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in entries.items())
    return struct.pack("<II", len(entries), 0) + body


def put(data, offset, layout, *values):
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def without_clocks(name, data):
    if name != "msrs":
        return data
    return {index: value for index, value in msrs_of(data).items() if index not in _CLOCKS}


def moments(vm, assembler):
    """When state may be read and set: at reset, between instructions, at each kind of pending access."""
    yield "reset"
    vm.load(
        assembler(
            "nop; out 0x80, al; in al, 0x80; mov [rdi], eax; mov ebx, [rdi]; rep insb; hlt; end: jmp end",
            "long",
        ),
        "long",
    )
    vm.set_regs(rdi=MMIO, rcx=0)
    yield "loaded"
    for moment in ("out", "in", "store", "load", "hlt"):
        exit_ = vm.vcpu.run()
        assert exit_.REASON == {"out": "io", "in": "io", "store": "mmio", "load": "mmio"}.get(moment, moment)
        yield moment
    vm.vcpu.kick()
    assert vm.vcpu.run().REASON == "interrupted"
    yield "interrupted"


@pytest.mark.parametrize("name", [name for name in VCPU_STATES if name != "lapic"])
def test_what_is_got_can_be_set(vm, assembler, name):
    for moment in moments(vm, assembler):
        vm.vcpu.complete()
        data = vm.vcpu.get_state(name)
        vm.vcpu.set_state(name, data)
        assert without_clocks(name, vm.vcpu.get_state(name)) == without_clocks(name, data), moment


@pytest.mark.parametrize("name", [name for name in VCPU_STATES if name != "lapic"])
def test_a_state_loads_in_another_machine(vm, engine, assembler, name):
    vm.load(assembler("nop", "long"), "long")
    data = vm.vcpu.get_state(name)
    with machine_on(engine) as other:
        other.load(assembler("nop", "long"), "long")
        other.vcpu.set_state(name, data)
        assert without_clocks(name, other.vcpu.get_state(name)) == without_clocks(name, data)


@pytest.mark.parametrize("name", [name for name in VCPU_STATES if name != "lapic"])
def test_a_wrong_length_is_refused(vm, name):
    data = vm.vcpu.get_state(name)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(Invalid):
            vm.vcpu.set_state(name, wrong)
    assert without_clocks(name, vm.vcpu.get_state(name)) == without_clocks(name, data)


def test_sizes_are_the_structs(vm):
    sizes = {
        "regs": 144,
        "sregs": 312,
        "fpu": 416,
        "xcrs": 392,
        "debugregs": 128,
        "events": 64,
        "mp_state": 4,
    }
    assert {name: len(vm.vcpu.get_state(name)) for name in sizes} == sizes
    assert len(vm.vcpu.get_state("xsave")) >= 4096


def test_unknown_names(vm):
    for call in (vm.vcpu.get_state, vm.machine.get_state):
        with pytest.raises(Invalid):
            call("nonsense")
    with pytest.raises(Invalid):
        vm.vcpu.set_state("nonsense", b"")
    with pytest.raises(Invalid):
        vm.machine.set_state("nonsense", b"")


def test_reset_state(vm):
    """Intel SDM 3A 9.1.1, table 9-1."""
    regs = vm.regs()
    assert regs["rip"] == 0xFFF0
    assert regs["rflags"] == 2
    assert {
        name: value for name, value in regs.items() if value and name not in ("rip", "rflags", "rdx")
    } == {}
    sregs = vm.vcpu.get_state("sregs")
    base, limit, selector, type_ = struct.unpack_from("<QIHB", sregs)
    assert (base, limit, selector, type_) == (0xFFFF0000, 0xFFFF, 0xF000, 0xB)
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = struct.unpack_from("<7Q", sregs, _CR0)
    assert (cr0, cr2, cr3, cr4, cr8, efer) == (0x60000010, 0, 0, 0, 0, 0)
    assert apic_base & 0xFFFFF100 == 0xFEE00100  # at its place, and this is the bootstrap processor
    fpu = vm.vcpu.get_state("fpu")
    assert struct.unpack_from("<I", fpu, _MXCSR) == (0x1F80,)
    debugregs = struct.unpack_from("<6Q", vm.vcpu.get_state("debugregs"))
    assert debugregs == (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    assert struct.unpack_from("<II", vm.vcpu.get_state("xcrs")) == (1, 0)
    assert struct.unpack_from("<IIQ", vm.vcpu.get_state("xcrs"), 8)[::2] == (0, 1)  # XCR0 is x87 alone
    assert vm.vcpu.get_state("mp_state") == bytes(4)  # KVM_MP_STATE_RUNNABLE


def test_second_cpu_is_no_bootstrap_processor(vm):
    sregs = vm.machine.create_vcpu(1).get_state("sregs")
    assert struct.unpack_from("<Q", sregs, _APIC_BASE)[0] & 0x100 == 0


def test_xcr0_has_what_cpuid_offers(vm):
    """CPUID.(0DH,0):EDX:EAX, less a component that is not there; x87 is there always (Intel SDM 1 13.3)."""
    entries = struct.iter_unpack("<7I12x", vm.vcpu.get_state("cpuid")[8:])
    offered = next(edx << 32 | eax for leaf, index, _, eax, _, _, edx in entries if (leaf, index) == (0xD, 0))
    before = vm.vcpu.get_state("xcrs")
    absent = [bit for bit in range(63) if not offered >> bit & 1]
    assert absent
    for bit in absent:
        with pytest.raises(Invalid):
            vm.vcpu.set_state("xcrs", put(before, 16, "<Q", 3 | 1 << bit))
    for value in (0, 2, 5):  # no x87; AVX without SSE
        with pytest.raises(Invalid):
            vm.vcpu.set_state("xcrs", put(before, 16, "<Q", value))
    assert vm.vcpu.get_state("xcrs") == before
    vm.vcpu.set_state("xcrs", put(before, 16, "<Q", 3))
    assert vm.vcpu.get_state("xcrs") == put(before, 16, "<Q", 3)


def test_cpuid_has_the_cpu_number(vm):
    for index in (0, 1):
        vcpu = vm.vcpu if index == 0 else vm.machine.create_vcpu(index)
        data = vcpu.get_state("cpuid")
        count = struct.unpack_from("<I", data)[0]
        leaves = {entry[0]: entry for entry in struct.iter_unpack("<7I12x", data[8:])}
        assert len(data) == 8 + 40 * count
        assert leaves[1][4] >> 24 == index  # EBX[31:24]
        assert not leaves[1][5] & (1 << 21 | 1 << 24)  # neither x2APIC nor TSC deadline without a LAPIC


def test_guest_sees_the_cpuid_that_was_set(engine, assembler):
    with machine_on(engine) as vm:
        data = bytearray(vm.vcpu.get_state("cpuid"))
        for at in range(8, len(data), 40):
            if struct.unpack_from("<I", data, at)[0] == 0:
                struct.pack_into(
                    "<III", data, at + 16, 0x73666D76, 0x73666D76, 0x73666D76
                )  # "vmfs" three times
        vm.vcpu.set_state("cpuid", bytes(data))
        vm.load(assembler("xor eax, eax; cpuid; hlt", "long"), "long")
        assert vm.vcpu.run().REASON == "hlt"
        regs = vm.regs()
        assert regs["rbx"] == regs["rcx"] == regs["rdx"] == 0x73666D76


def test_other_cpuid_after_a_run(vm, assembler, divergences):
    vm.load(assembler("hlt", "long"), "long")
    vm.vcpu.run()
    data = bytearray(vm.vcpu.get_state("cpuid"))
    struct.pack_into("<I", data, 8 + 16, 0x12345678)  # EBX of the first leaf
    if "kvm-cpuid-is-final" in divergences:
        with pytest.raises(Invalid, match="a CPU that has run keeps its CPUID"):
            vm.vcpu.set_state("cpuid", bytes(data))
        assert vm.vcpu.get_state("cpuid") != bytes(data)
    else:
        vm.vcpu.set_state("cpuid", bytes(data))
        assert vm.vcpu.get_state("cpuid") == bytes(data)


def test_hostile_cpuid(vm):
    data = vm.vcpu.get_state("cpuid")
    for count in (0xFFFFFFFF, 257, 1 << 31):
        with pytest.raises(Invalid):
            vm.vcpu.set_state("cpuid", put(data, 0, "<I", count))
    assert vm.vcpu.get_state("cpuid") == data


@pytest.mark.parametrize(
    "offset, value",
    [
        (_CR0, 1 << 31),  # paging without protection (SDM 3A 2.5)
        (_CR4, 1 << 63),  # a reserved bit
        (_EFER_AT, 1 << 10),  # LMA without LME and paging
        (_CR0, 0x20000000),  # NW without CD
    ],
)
def test_impossible_sregs_are_refused(vm, offset, value):
    before = vm.vcpu.get_state("sregs")
    regs = vm.vcpu.get_state("regs")
    with pytest.raises(Invalid):
        vm.vcpu.set_state("sregs", put(before, offset, "<Q", value))
    assert vm.vcpu.get_state("sregs") == before
    assert vm.vcpu.get_state("regs") == regs


def test_cr8_set_is_the_guests(vm, assembler):
    vm.load(assembler("mov rax, cr8; hlt; mov ebx, 3; mov cr8, rbx; hlt", "long"), "long")
    vm.vcpu.set_state("sregs", put(vm.vcpu.get_state("sregs"), _CR8, "<Q", 9))
    assert vm.vcpu.run().REASON == "hlt"
    assert vm.regs()["rax"] == 9
    assert vm.vcpu.run().REASON == "hlt"
    assert struct.unpack_from("<Q", vm.vcpu.get_state("sregs"), _CR8) == (3,)


def test_reserved_mxcsr_bits_are_refused(vm):
    before = vm.vcpu.get_state("fpu")
    with pytest.raises(Invalid):
        vm.vcpu.set_state("fpu", put(before, _MXCSR, "<I", 0x80000000))
    assert vm.vcpu.get_state("fpu") == before


def test_xmm_and_x87_registers_are_the_guests(vm, assembler):
    """User mode: it runs on the CPU itself with every KVM, and the kernel's is emulated by some."""
    program = assembler(
        """
            movups [0x3000], xmm3
            fstp qword ptr [0x3010]
            mov rax, 0x4008000000000000
            movq xmm5, rax
            fld1
            out 0x80, al
        """,
        "user",
    )
    vm.load(program, "user")
    fpu = bytearray(vm.vcpu.get_state("fpu"))
    fpu[_XMM + 3 * 16 : _XMM + 4 * 16] = bytes(range(16))
    fpu[0:10] = struct.pack("<QH", 0xC000000000000000, 0x4000)  # st0 is 3.0
    struct.pack_into("<HHB", fpu, _FCW, 0x37F, 0, 0xFF)  # no register is empty
    vm.vcpu.set_state("fpu", bytes(fpu))
    assert vm.vcpu.run().REASON == "io"
    assert vm.ram.read(0x3000, 16) == bytes(range(16))
    assert struct.unpack("<d", vm.ram.read(0x3010, 8)) == (3.0,)
    fpu = vm.vcpu.get_state("fpu")
    assert struct.unpack_from("<d", fpu, _XMM + 5 * 16) == (3.0,)
    assert fpu[0:10] == struct.pack("<QH", 1 << 63, 0x3FFF)  # st0 is 1.0


def test_fpu_and_xsave_are_two_views_of_one(vm):
    fpu = bytearray(vm.vcpu.get_state("fpu"))
    fpu[_XMM : _XMM + 16] = b"0123456789abcdef"
    vm.vcpu.set_state("fpu", bytes(fpu))
    assert vm.vcpu.get_state("xsave")[160:176] == b"0123456789abcdef"  # SDM 1 10.5.1, FXSAVE's layout


def test_ymm_is_the_upper_half_and_xmm(vm):
    if not has_avx(vm.vcpu):
        pytest.skip("the CPU has no AVX")
    low, high = int.from_bytes(b"0123456789abcdef", "little"), 1 << 127 | 3
    write_registers(vm.vcpu, {"ymm5": high << 128 | low, "xmm6": 9})
    assert int(read_register(vm.vcpu, "xmm5"), 16) == low
    assert int(read_register(vm.vcpu, "xmm6"), 16) == 9  # of the same change, and not lost
    assert vm.vcpu.get_state("xsave")[576 + 5 * 16 : 576 + 6 * 16] == high.to_bytes(16, "little")
    write_registers(vm.vcpu, {"xmm5": 1})
    assert int(read_register(vm.vcpu, "ymm5"), 16) == high << 128 | 1


def test_msr(vm, assembler):
    vm.load(assembler(f"mov ecx, {_LSTAR:#x}; rdmsr; hlt", "long"), "long")
    vm.vcpu.set_msr(_LSTAR, 0xFFFF800012345678)
    assert vm.vcpu.get_msr(_LSTAR) == 0xFFFF800012345678
    assert vm.vcpu.run().REASON == "hlt"
    assert (vm.regs()["rdx"], vm.regs()["rax"]) == (0xFFFF8000, 0x12345678)


def test_msrs_that_there_are_not(vm):
    for index in (0x12345678, 0xFFFFFFFF):
        with pytest.raises(Invalid):
            vm.vcpu.get_msr(index)
        with pytest.raises(Invalid):
            vm.vcpu.set_msr(index, 0)


def test_msr_values_that_raise_gp(vm):
    vm.vcpu.set_msr(_LSTAR, 0x1000)
    with pytest.raises(Invalid):
        vm.vcpu.set_msr(_EFER, 1 << 63)  # reserved
    assert vm.vcpu.get_msr(_EFER) == 0
    assert vm.vcpu.get_msr(_LSTAR) == 0x1000


def test_saved_msrs(vm):
    msrs = msrs_of(vm.vcpu.get_state("msrs"))
    assert {_LSTAR, _SYSENTER_CS, _TSC} <= set(msrs)
    assert len(msrs) == struct.unpack_from("<I", vm.vcpu.get_state("msrs"))[0], "one is there twice"
    for index, value in msrs.items():
        if index not in _CLOCKS:
            assert vm.vcpu.get_msr(index) == value


def test_msrs_are_set_all_or_none(vm):
    vm.vcpu.set_msr(_LSTAR, 0x1111)
    vm.vcpu.set_msr(_SYSENTER_CS, 0x22)
    good = {_LSTAR: 0x3333, _SYSENTER_CS: 0x44}
    for bad in ({0x12345678: 0}, {_EFER: 1 << 63}):
        with pytest.raises(Invalid):
            vm.vcpu.set_state("msrs", pack_msrs(good | bad))
        assert (vm.vcpu.get_msr(_LSTAR), vm.vcpu.get_msr(_SYSENTER_CS)) == (0x1111, 0x22)
    vm.vcpu.set_state("msrs", pack_msrs(good))
    assert (vm.vcpu.get_msr(_LSTAR), vm.vcpu.get_msr(_SYSENTER_CS)) == (0x3333, 0x44)


def test_hostile_msrs(vm):
    for data in (b"", b"\1\0\0\0", struct.pack("<II", 0xFFFFFFFF, 0), struct.pack("<II", 2, 0) + bytes(16)):
        with pytest.raises(Invalid):
            vm.vcpu.set_state("msrs", data)


def test_debugregs(vm, assembler):
    """The guest's own: it reads what was set."""
    vm.load(assembler("mov rax, dr0; mov rbx, dr3; hlt", "long"), "long")
    debugregs = put(vm.vcpu.get_state("debugregs"), 0, "<4Q", 0x1000, 2, 3, 0xFFFF800000000000)
    vm.vcpu.set_state("debugregs", debugregs)
    assert vm.vcpu.run().REASON == "hlt"
    assert (vm.regs()["rax"], vm.regs()["rbx"]) == (0x1000, 0xFFFF800000000000)


def test_a_pending_nmi_is_in_events(vm):
    assert vm.vcpu.get_state("events")[13] == 0  # kvm_vcpu_events.nmi.pending
    vm.vcpu.nmi()
    assert vm.vcpu.get_state("events")[13] == 1


def test_clock(vm):
    data = vm.machine.get_state("clock")
    assert len(data) == 48
    vm.machine.set_state("clock", data)
    vm.machine.set_state("clock", put(data, 0, "<Q", 1 << 50))
    now = struct.unpack_from("<Q", vm.machine.get_state("clock"))[0]
    assert 1 << 50 <= now < (1 << 50) + 60 * 10**9
    with pytest.raises(Invalid):
        vm.machine.set_state("clock", data[:-1])


def test_states_of_controllers_that_there_are_not(vm):
    with pytest.raises(Unsupported):
        vm.vcpu.get_state("lapic")
    with pytest.raises(Unsupported):
        vm.vcpu.set_state("lapic", bytes(1024))
    for name in set(MACHINE_STATES) - {"clock"}:
        with pytest.raises(Unsupported):
            vm.machine.get_state(name)
        with pytest.raises(Unsupported):
            vm.machine.set_state(name, b"")
    with pytest.raises(Unsupported):
        vm.machine.irq_line(4, True)


def test_translate(vm, assembler):
    assert vm.vcpu.translate(0x1234) == 0x1234  # no paging
    vm.load(assembler("hlt", "long"), "long")
    assert vm.vcpu.translate(0x1234) == 0x1234
    assert vm.vcpu.translate(0xFFFFFFFF) == 0xFFFFFFFF  # the first 4 GiB are mapped
    assert vm.vcpu.translate(1 << 32) is None
    assert vm.vcpu.translate(0xFFFF800000000000) is None
    pml4 = struct.unpack_from("<Q", vm.vcpu.get_state("sregs"), _CR3)[0]
    vm.ram.write(pml4 + 8 * 256, vm.ram.read(pml4, 8))  # the kernel's half, at the same memory
    assert vm.vcpu.translate(0xFFFF800000001234) == 0x1234


def test_a_closed_cpu_says_so(engine):
    with machine_on(engine) as vm:
        vm.vcpu.close()
        vm.vcpu.close()
        vm.vcpu.kick()
        vm.vcpu.clear_kick()
        assert vm.vcpu.access_data == b""
        with pytest.raises(EngineFailed):
            vm.vcpu.get_state("regs")
        with pytest.raises(EngineFailed):
            vm.vcpu.run()


def test_registers_of_an_exit_at_the_origin(vm, assembler):
    """Values that a sign or a width would spoil."""
    vm.load(assembler("hlt", "long"), "long")
    values = {f"r{number}": (1 << 63) + number for number in range(8, 16)} | {
        "rax": (1 << 64) - 1,
        "rbp": 1 << 32,
    }
    vm.set_regs(**values)
    assert vm.vcpu.run().rip == ORIGIN + 1
    assert {name: vm.regs()[name] for name in values} == values
