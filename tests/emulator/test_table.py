"""The instruction table as a whole: every row has a handler and a test.

A row is compared with the host CPU by test_instructions.py, or in compatibility mode by test_legacy.py, or it
is in ELSEWHERE, which names the test that runs it, and why the comparison cannot.
"""

import re
from pathlib import Path

import pytest

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import encode  # noqa: E402
from emulator.system_lib import DATA, FREE, STOP, Guest, descriptor  # noqa: E402
from emulator.test_legacy import SIMPLE  # noqa: E402

HERE = Path(__file__).parent
ROWS = _core.instructions()
# name: (file, test, why the row is not compared with the host)
PRIVILEGED = "only at CPL 0"
SELECTORS = "depends on descriptor tables"
FAR = "leaves the code segment"
STATE = "the area's contents differ between processors"
ELSEWHERE = {
    "HLT": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "RDRAND": ("test_integer.py", "test_rdrand_writes_its_size", "random"),
    "RDSEED": ("test_integer.py", "test_rdrand_writes_its_size", "random"),
    "MOV": ("test_system_checks.py", "test_accessed_bits_are_set", SELECTORS),
    **{f"{what}_{segment}": ("test_table.py", "test_segments_on_the_stack", SELECTORS)
       for segment in ("ES", "SS", "DS", "FS", "GS") for what in ("PUSH", "POP")},
    "PUSH_CS": ("test_table.py", "test_segments_on_the_stack", SELECTORS),
    **{name: ("test_table.py", "test_far_pointers_to_segments", SELECTORS)
       for name in ("LES", "LDS", "LSS", "LFS", "LGS")},
    "JMP_FAR": ("test_system_checks.py", "test_accessed_bits_are_set", FAR),
    "CALL_FAR": ("test_system_checks.py", "test_call_gates", FAR),
    "RET_FAR": ("test_system_checks.py", "test_retf_to_an_outer_level", FAR),
    "IRET": ("test_system_checks.py", "test_iret_flags_by_privilege", FAR),
    "INT3": ("test_system_checks.py", "test_checks", FAR),
    "INT": ("test_system_checks.py", "test_checks", FAR),
    "INTO": ("test_system_checks.py", "test_checks", FAR),
    "INT1": ("test_system_checks.py", "test_checks", FAR),
    "SYSCALL": ("test_system_checks.py", "test_syscall_sysret", FAR),
    "SYSRET": ("test_system_checks.py", "test_syscall_sysret", FAR),
    "SYSENTER": ("test_system_checks.py", "test_sysenter_sysexit", FAR),
    "SYSEXIT": ("test_system_checks.py", "test_sysenter_sysexit", FAR),
    "SLDT": ("test_system_checks.py", "test_smsw_sldt_str_widths", "the host has UMIP"),
    "STR": ("test_system_checks.py", "test_smsw_sldt_str_widths", "the host has UMIP"),
    "SMSW": ("test_system_checks.py", "test_smsw_sldt_str_widths", "the host has UMIP"),
    "SGDT": ("test_system_checks.py", "test_lgdt_widths", "the host has UMIP"),
    "SIDT": ("test_system_checks.py", "test_checks", "the host has UMIP"),
    "LGDT": ("test_system_checks.py", "test_lgdt_widths", PRIVILEGED),
    "LIDT": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "LLDT": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "LTR": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "LMSW": ("test_system_checks.py", "test_lmsw_sets_pe_and_never_clears_it", PRIVILEGED),
    **{name: ("test_system_checks.py", "test_lar_lsl_verr_verw", SELECTORS)
       for name in ("VERR", "VERW", "LAR", "LSL")},
    "INVLPG": ("test_system_paging.py", "test_a_cached_translation_stays_until_invlpg", PRIVILEGED),
    "INVPCID": ("test_system_paging.py", "test_a_cached_translation_stays_until_invlpg", PRIVILEGED),
    "SWAPGS": ("test_system_checks.py", "test_swapgs_and_bases", PRIVILEGED),
    "RDTSCP": ("test_system_checks.py", "test_rdtscp_rdpid", "time"),
    "RDPID": ("test_system_checks.py", "test_rdtscp_rdpid", "the host's CPU number"),
    "RDTSC": ("test_system_checks.py", "test_tsc_counts_instructions_and_adjusts", "time"),
    "RDPMC": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "CLAC": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "STAC": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "RDPKRU": ("test_sse_state.py", "test_pkru_component", "the host has no PKU"),
    "WRPKRU": ("test_sse_state.py", "test_pkru_component", "the host has no PKU"),
    "CLTS": ("test_system_checks.py", "test_ts_and_clts", PRIVILEGED),
    "INVD": ("test_table.py", "test_caches", PRIVILEGED),
    "WBINVD": ("test_table.py", "test_caches", PRIVILEGED),
    "MOV_CR": ("test_system_checks.py", "test_checks", PRIVILEGED),
    "MOV_DR": ("test_system_checks.py", "test_debug_registers", PRIVILEGED),
    "WRMSR": ("test_system_time.py", "test_tsc_deadline_and_x2apic", PRIVILEGED),
    "RDMSR": ("test_system_time.py", "test_msrs_that_linux_reads", PRIVILEGED),
    "CPUID": ("test_system_time.py", "test_cpuid_instruction", "the host's is another CPU"),
    **{name: ("test_system_checks.py", "test_swapgs_and_bases", "the host's FS belongs to its C library")
       for name in ("RDFSBASE", "RDGSBASE", "WRFSBASE", "WRGSBASE")},
    **{name: ("test_system_checks.py", "test_io_permission_map", "ports") for name in ("IN", "OUT")},
    **{name: ("../engine/cases/access.py", None, "ports") for name in ("INS", "OUTS")},
    "CLI": ("test_system_checks.py", "test_pvi", PRIVILEGED),
    "STI": ("test_system_checks.py", "test_pvi", PRIVILEGED),
    "MASKMOVQ": ("test_mmx.py", "test_maskmovq", "faults with an empty mask differ between makers"),
    "VMASKMOVDQU": ("test_avx.py", "test_vmaskmovdqu", "faults with an empty mask differ between makers"),
    "MASKMOVDQU": ("test_sse.py", "test_maskmovdqu", "faults with an empty mask differ between makers"),
    **{name: ("test_sse_state.py", "test_save", STATE) for name in ("FXSAVE", "XSAVE", "XSAVEC", "XSAVES")},
    **{name: ("test_sse_state.py", "test_restore", STATE) for name in ("FXRSTOR", "XRSTOR")},
    "XSAVEOPT": ("test_sse_state.py", "test_xsaveopt_leaves_initial_components_out", STATE),
    "XRSTORS": ("test_sse_state.py", "test_xrstors_takes_only_the_compacted_form", PRIVILEGED),
    "LDMXCSR": ("test_sse_state.py", "test_ldmxcsr", "AMD has a bit more"),
    "XGETBV": ("test_sse_state.py", "test_xgetbv", "the host has other components"),
    "XSETBV": ("test_sse_state.py", "test_xsetbv", PRIVILEGED),
    **{name: ("test_sse.py", "test_sha", "AMD does not ask for aligned memory") for name in (
        "SHA1NEXTE", "SHA1MSG1", "SHA1MSG2", "SHA256MSG1", "SHA256MSG2", "SHA256RNDS2", "SHA1RNDS4")},
}


def is_compared(row):
    return encode.testable(row) or ("NO64" in row["attributes"] and row["name"] in SIMPLE)


def test_every_row_has_a_handler():
    """Without one it would be #UD (test_fuzz.py)."""
    assert not [row["name"] for row in ROWS if not row["handler"]]


def test_every_row_has_a_test():
    needed = {row["name"] for row in ROWS if not is_compared(row)}
    assert needed - set(ELSEWHERE) == set(), "rows without a test"
    assert set(ELSEWHERE) - needed == set(), "these have no such row any more, or are compared with the host"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_test_is_there(name):
    file, test, _ = ELSEWHERE[name]
    text = (HERE / file).read_text()
    if test:
        assert re.search(rf"^def {test}\(", text, re.M), f"{file} has no {test}"


def test_no_two_rows_take_the_same_encoding():
    """The first would hide the second."""
    seen = {}
    for row in ROWS:
        where = (
            row["map"], row["opcode"], row["prefix"], row["digit"], row["mod"], row["length"], row["w"],
            "NO64" in row["attributes"], "ONLY64" in row["attributes"], "NOREXB" in row["attributes"],
            "AVX" in row["attributes"],
        )  # fmt: skip
        assert where not in seen, f"{row['name']} after {seen[where]}"
        seen[where] = row["name"]


# ---- Rows that nothing else runs ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("segment", ["es", "ss", "ds", "fs", "gs"])
def test_segments_on_the_stack(mode, segment):
    """POP loads, PUSH gives the selector back. In 64-bit mode there are FS and GS only."""
    if mode == "long" and segment in ("es", "ss", "ds"):
        byte = {"es": 0x06, "ss": 0x16, "ds": 0x1E}[segment]
        for code in (byte, byte + 1, 0x0E):
            with Guest("long") as guest:
                assert guest.run(f".byte {code}") == 6
        return
    with Guest(mode) as guest:
        kind = 3 if segment == "ss" else 1  # writable, or read-only
        guest.set_descriptor(FREE, descriptor(DATA if segment != "ss" else 0, kind=kind))
        wide = "rax" if mode == "long" else "eax"
        stack = guest.regs()["rsp"]
        assert guest.run(f"push {FREE}; pop {segment}; push {segment}; pop {wide}") == STOP
        now = guest.segment(segment)
        assert now.selector == FREE == guest.regs()["rax"]
        assert now.type == kind | 1
        assert now.base == (0 if segment == "ss" else DATA)
        assert guest.regs()["rsp"] == stack - (40 if mode == "long" else 12)  # the frame of the end
    if mode == "protected":
        with Guest(mode) as guest:
            assert guest.run("push cs; pop eax") == STOP
            assert guest.regs()["rax"] == guest.segment("cs").selector


@pytest.mark.parametrize("segment", ["es", "ss", "ds", "fs", "gs"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_far_pointers_to_segments(segment, bits):
    """LES and its kind: offset, then selector; LES and LDS are VEX prefixes in 64-bit mode."""
    if bits == 64 and segment in ("es", "ds"):
        return
    register = {16: "bx", 32: "ebx", 64: "rbx"}[bits]
    with Guest("long" if bits == 64 else "protected") as guest:
        guest.set_descriptor(FREE, descriptor(kind=3))
        guest.put(DATA, 0x1122334455667788 % 2**bits, bits // 8)
        guest.put(DATA + bits // 8, FREE, 2)
        guest.set(rbx=0xFFFFFFFF)
        # as knows no REX.W there in Intel syntax
        code = f"l{segment} {register}, [{DATA}]"
        if bits == 64:
            opcode = {"ss": 0xB2, "fs": 0xB4, "gs": 0xB5}[segment]
            code = f".byte 0x48, 0x0f, {opcode}, 0x1c, 0x25; .long {DATA}"
        assert guest.run(code) == STOP
        assert guest.segment(segment).selector == FREE
        assert guest.regs()["rbx"] == {16: 0xFFFF7788, 32: 0x55667788, 64: 0x1122334455667788}[bits]


@pytest.mark.parametrize("code", ["invd", "wbinvd"])
def test_caches(code):
    """Nothing is cached here, so that they do nothing; at CPL 3 they are #GP(0)."""
    with Guest("protected") as guest:
        assert guest.run(f"mov dword ptr [{DATA}], 0x12345678; {code}; mov eax, [{DATA}]") == STOP
        assert guest.regs()["rax"] == 0x12345678
    with Guest("protected", 3) as guest:
        assert guest.run(code) == 13
        assert guest.error == 0
