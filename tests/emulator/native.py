"""Run one instruction on the host CPU and on the emulator core, from the same state, and compare.

Both see the same memory at the same addresses: a code area and a data area, with nothing mapped between and
around them. The core runs in 64-bit mode at CPL 3 with identity page tables. The host runs a byte string
through native.c; the code area is full of INT3, so that it stops wherever the instruction went.
"""

import ctypes
import mmap
import os
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from emulator.freedoms import DATA, PAGE, in_the_cores_way

from vmfs.engine.emulator import _core

HERE = Path(__file__).parent
BASE = 0x2000_0000
CODE, CODE_SIZE = BASE + 0x10000, 4 * PAGE  # relative jumps of the tests stay in here
DATA_SIZE = 4 * PAGE  # at DATA; the pages before and after are not mapped
START = CODE + 2 * PAGE - 64
GPRS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
KVM_ORDER = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15".split()
CF, PF, AF, ZF, SF, TF, DF, OF = 1, 4, 16, 64, 128, 256, 1024, 2048
ARITHMETIC = CF | PF | AF | ZF | SF | OF
COMPLETED = -1  # in place of a vector
AVX = "avx" in open("/proc/cpuinfo").read().partition("flags")[2].partition("\n")[0].split()
# AddressSanitizer has its shadow memory where the guest has nothing: there a stray access succeeds natively.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
ASAN_SHADOW = range(0x7FFF8000, 0x10007FFF8000)  # sanitizer_common's x86-64 mapping


@dataclass
class Case:
    """One instruction and what it starts from; `data` is the contents of the data area."""

    code: bytes
    gprs: dict[str, int]
    flags: int
    data: bytes
    fx: bytes  # FXSAVE image: x87, MMX, XMM, MXCSR
    ymm: bytes = bytes(256)  # upper halves of YMM registers
    ip: int = START
    name: str = ""
    undefined: int = 0  # arithmetic flags that are not compared


@dataclass
class Outcome:
    """What came of it: `vector` is COMPLETED, or the exception, with the registers before the instruction."""

    vector: int
    gprs: dict[str, int]
    ip: int
    flags: int
    data: bytes
    fx: bytes
    ymm: bytes = bytes(256)
    error: int = 0
    address: int = 0  # of a page fault
    notes: list[str] = field(default_factory=list)


class NativeState(ctypes.Structure):
    _fields_ = [
        ("gpr", ctypes.c_uint64 * 16),
        ("rip", ctypes.c_uint64),
        ("rflags", ctypes.c_uint64),
        ("fault_address", ctypes.c_uint64),
        ("vector", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("avx", ctypes.c_uint64),
        ("pad", ctypes.c_uint64 * 3),
        ("fx", ctypes.c_uint8 * 512),
        ("components", ctypes.c_uint64),
        ("header", ctypes.c_uint64 * 7),
        ("ymm", ctypes.c_uint8 * 256),
    ]


def build(directory: Path) -> Path:
    """Compile native.c; the path of the library."""
    library = Path(directory) / "native.so"
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, HERE / "native.c"],
        check=True,
    )
    return library


class Host:
    """The CPU that this runs on."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.native_map.restype = ctypes.c_uint64
        self.lib.native_map.argtypes = [
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int,
        ]
        self.fd = os.memfd_create("native")
        os.ftruncate(self.fd, CODE_SIZE + DATA_SIZE)
        self.memory = mmap.mmap(self.fd, CODE_SIZE + DATA_SIZE)
        for address, size, offset, executable in ((CODE, CODE_SIZE, 0, 1), (DATA, DATA_SIZE, CODE_SIZE, 0)):
            if self.lib.native_map(address, size, self.fd, offset, executable) != address:
                raise OSError(f"cannot map {address:#x}")
        buffer = ctypes.create_string_buffer(ctypes.sizeof(NativeState) + 64)
        aligned = (ctypes.addressof(buffer) + 63) & ~63
        self.buffer, self.state = buffer, NativeState.from_address(aligned)

    def run(self, case: Case, compat: bool = False) -> Outcome:
        """In 64-bit mode, or in compatibility mode, where registers have 32 bits and none is R8 to R15."""
        s, at = self.state, case.ip - CODE
        self.memory[:CODE_SIZE] = b"\xcc" * CODE_SIZE
        self.memory[at : at + len(case.code)] = case.code
        self.memory[CODE_SIZE:] = case.data
        s.gpr[:] = [case.gprs[name] for name in GPRS]
        s.rip, s.rflags, s.fault_address, s.vector, s.error = case.ip, case.flags | 0x202, 0, 0, 0
        ctypes.memmove(s.fx, case.fx, 512)
        ctypes.memmove(s.ymm, case.ymm, 256)
        s.avx = AVX  # what is zero begins in its initial state: XINUSE
        s.components = 1 | 2 * any(case.fx[160:416]) | 4 * any(case.ymm)
        (self.lib.native_run_compat if compat else self.lib.native_run)(ctypes.byref(s))
        arrived = s.vector == 14 and s.rip == s.fault_address != case.ip  # a jump to where nothing is mapped
        trapped = s.vector == 3 and s.rip != case.ip + 1
        done = arrived or trapped
        return Outcome(
            vector=COMPLETED if done else s.vector,
            gprs=dict(zip(GPRS, s.gpr, strict=True)),
            ip=s.rip - trapped,
            flags=s.rflags & (ARITHMETIC | DF),
            data=self.memory[CODE_SIZE:],
            fx=bytes(s.fx),
            ymm=bytes(s.ymm) if AVX else case.ymm,
            error=0 if done else s.error,
            address=s.fault_address if s.vector == 14 else 0,
        )


def _segment(selector, kind, *, code=False, system=False, dpl=0):
    db, s, long_mode = not code and not system, not system, code
    return struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, selector, kind, 1, dpl, db, s, long_mode, 1, 0, 0, 0)


def user_sregs(cr3: int) -> bytes:
    """struct kvm_sregs: 64-bit mode, CPL 3, paging, SSE on."""
    code, data = _segment(0x2B, 11, code=True, dpl=3), _segment(0x33, 3, dpl=3)
    return (
        code
        + data * 5
        + _segment(0x40, 11, system=True)
        + bytes(24 - 2)
        + b"\1\0"
        + struct.pack("<QHHHH", 0, 0, 0, 0, 0) * 2
        + struct.pack("<7Q", 0x80050033, 0, cr3, 0x40620, 0, 0xD01, 0xFEE00900)
        + bytes(32)
    )


class Core:
    """The emulator core."""

    def __init__(self) -> None:
        self.vm = _core.Vm()
        self.fd = os.memfd_create("core")
        os.ftruncate(self.fd, 0x10000 + CODE_SIZE + DATA_SIZE)
        self.memory = mmap.mmap(self.fd, 0x10000 + CODE_SIZE + DATA_SIZE)
        self.vm.map(0, 0, self.fd, 0, 0x10000)
        self.vm.map(1, CODE, self.fd, 0x10000, CODE_SIZE)
        self.vm.map(2, DATA, self.fd, 0x10000 + CODE_SIZE, DATA_SIZE)
        self.cpu = self.vm.create_vcpu(0)
        for level, table, entry in ((39, 0x1000, 0x2007), (30, 0x2000, 0x3007), (21, 0x3000, 0x4007)):
            struct.pack_into("<Q", self.memory, table + (BASE >> level & 511) * 8, entry)
        for start, size in ((CODE, CODE_SIZE), (DATA, DATA_SIZE)):
            for page in range(start, start + size, PAGE):
                struct.pack_into("<Q", self.memory, 0x4000 + (page >> 12 & 511) * 8, page | 7)
        self.cpu.set_state("sregs", user_sregs(0x1000))
        xcrs = bytearray(self.cpu.get_state("xcrs"))
        struct.pack_into("<Q", xcrs, 16, 7 if AVX else 3)
        self.cpu.set_state("xcrs", bytes(xcrs))
        self.cpu.set_debug(False, [(_core.STOP_VECTOR, vector, vector, 0, 0, 0) for vector in range(32)])

    def load(self, case: Case) -> None:
        cpu, at = self.cpu, 0x10000 + case.ip - CODE
        self.memory[0x10000 : 0x10000 + CODE_SIZE] = b"\xcc" * CODE_SIZE
        self.memory[at : at + len(case.code)] = case.code
        self.memory[0x10000 + CODE_SIZE :] = case.data
        values = [case.gprs[name] for name in KVM_ORDER]
        cpu.set_state("regs", struct.pack("<18Q", *values, case.ip, case.flags | 0x202))
        xsave = bytearray(4096)
        xsave[:512] = case.fx
        struct.pack_into("<Q", xsave, 512, 7)
        xsave[576:832] = case.ymm
        cpu.set_state("xsave", bytes(xsave))

    def run(self, case: Case) -> Outcome:
        self.load(case)
        return self.outcome(case, self.cpu.run(1))

    def outcome(self, case: Case, exit: tuple) -> Outcome:
        """The state, after an exit at the budget (done) or at an exception."""
        cpu = self.cpu
        reason, vector, message = exit[0], exit[8], exit[9]
        if reason == _core.EXIT_LIMIT:
            vector = COMPLETED
        elif reason != _core.EXIT_DEBUG:
            raise AssertionError(f"{case.name} {case.code.hex()}: the core made exit {exit} {message}")
        *regs, ip, flags = struct.unpack("<18Q", cpu.get_state("regs"))
        return Outcome(
            vector=vector,
            gprs=dict(zip(KVM_ORDER, regs, strict=True)),
            ip=ip,
            flags=flags & (ARITHMETIC | DF),
            data=self.memory[0x10000 + CODE_SIZE :],
            fx=(area := cpu.get_state("xsave"))[:512],
            ymm=area[576:832],
            address=exit[5] if vector == 14 else 0,
        )


# FXSAVE fields that are compared: control, status, tag words, MXCSR, ST and XMM registers. The x87
# instruction and data pointers and the opcode are not: processors differ in when they keep them.
FX_COMPARED = ((0, 5), (24, 28), *((32 + 16 * i, 42 + 16 * i) for i in range(8)), (160, 416))


def differences(case: Case, host: Outcome, core: Outcome) -> list[str]:
    """What differs, a sentence each; but for what processors may do as they like (freedoms.py)."""
    if SANITIZED and host.vector == COMPLETED and core.vector == 14 and core.address in ASAN_SHADOW:
        return []  # there is memory for the host
    found = _differences(case, host, core)
    if found and any(not _differences(case, other, core) for other in in_the_cores_way(case, host, core)):
        return []
    return found


def _differences(case: Case, host: Outcome, core: Outcome) -> list[str]:
    found = []
    if host.vector != core.vector:
        return [f"vector: host {host.vector}, core {core.vector}"]
    if host.ip != core.ip:
        found.append(f"rip: host {host.ip:#x}, core {core.ip:#x}")
    for name in GPRS:
        if host.gprs[name] != core.gprs[name]:
            found.append(f"{name}: host {host.gprs[name]:#x}, core {core.gprs[name]:#x}")
    undefined = case.undefined if host.vector == COMPLETED else 0
    if (host.flags ^ core.flags) & ~undefined:
        found.append(f"flags: host {host.flags:#x}, core {core.flags:#x}, not compared {undefined:#x}")
    if host.data != core.data:
        at = next(i for i in range(DATA_SIZE) if host.data[i] != core.data[i])
        host_bytes, core_bytes = (data[at : at + 16].hex() for data in (host.data, core.data))
        found.append(f"memory at {DATA + at:#x}: host {host_bytes}, core {core_bytes}")
    for start, end in FX_COMPARED:
        if host.fx[start:end] != core.fx[start:end]:
            found.append(f"fx[{start}]: host {host.fx[start:end].hex()}, core {core.fx[start:end].hex()}")
    for at in range(0, 256, 16):
        if host.ymm[at : at + 16] != core.ymm[at : at + 16]:
            host_half, core_half = (half[at : at + 16].hex() for half in (host.ymm, core.ymm))
            found.append(f"ymm{at // 16}h: host {host_half}, core {core_half}")
    return found


def describe(case: Case) -> str:
    """The case, to reproduce it by hand."""
    regs = " ".join(f"{name}={value:#x}" for name, value in case.gprs.items())
    return f"{case.name}: {case.code.hex()} at {case.ip:#x}, flags={case.flags:#x}, {regs}"
