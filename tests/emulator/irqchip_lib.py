"""The emulator's interrupt chip alone, through ctypes, and the host's KVM with the same methods.

`Chip` is vmfs/engine/emulator/core's; `Kvm` is the oracle: a VM with KVM_CREATE_IRQCHIP and KVM_CREATE_PIT2
whose registers a small guest reads and writes (irqchip_guest.S).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "vmfs" / "engine" / "emulator" / "core"
CHIP = CORE / "chip"
SOURCES = [
    CHIP / name
    for name in ("irqchip.c", "apic.c", "ioapic.c", "pic.c", "pit.c")
] + [HERE / "irqchip_shim.c"]
GIVEN_LIBRARY = "VMFS_TEST_IRQCHIP_LIBRARY"
NEVER = 2**64 - 1
LAPIC = 0xFEE00000
IOAPIC = 0xFEC00000

BASE = LAPIC  # IA32_APIC_BASE values: disabled, xAPIC, x2APIC
ENABLED, X2APIC = BASE | 0x800, BASE | 0xC00
TICKS = 1193182  # 8254 ticks a second

INIT_PICS = [
    ("outb", 0x20, 0x11),
    ("outb", 0x21, 0x20),
    ("outb", 0x21, 4),
    ("outb", 0x21, 1),
    ("outb", 0xA0, 0x11),
    ("outb", 0xA1, 0x28),
    ("outb", 0xA1, 2),
    ("outb", 0xA1, 1),
]
MASK_PICS = [("outb", 0x21, 0xFF), ("outb", 0xA1, 0xFF)]
ENABLE_LAPIC = [("store", LAPIC + 0xF0, 0x1FF)]

PIC_FIELDS = (
    "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi "
    "rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"
).split()
PIT_CHANNEL = struct.Struct("<IH10Bq")
PIT_FIELDS = (
    "count latched_count count_latched status_latched status read_state write_state write_latch rw_mode "
    "mode bcd gate count_load_time"
).split()


def build(directory, sanitize=False):
    """Compile the chip and its shim into a shared library; the path of it."""
    library = Path(directory) / ("irqchip-san.so" if sanitize else "irqchip.so")
    flags = (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1"] if sanitize else ["-O2"]
    )
    subprocess.run(
        [
            "gcc",
            "-std=gnu11",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            *flags,
            f"-I{CORE}",
            f"-I{CHIP}",
            "-o",
            library,
            *SOURCES,
        ],
        check=True,
    )
    return library


def given_or_built(tmp_path_factory):
    """The library that the sanitizer run names, or one built now."""
    return load(os.environ.get(GIVEN_LIBRARY) or build(tmp_path_factory.mktemp("irqchip")))


def build_guest(directory):
    """Assemble the guest; its bytes, to be loaded at 0x1000."""
    obj, image = Path(directory) / "guest.o", Path(directory) / "guest.bin"
    subprocess.run(["gcc", "-m32", "-c", HERE / "irqchip_guest.S", "-o", obj], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", obj, image], check=True)
    return image.read_bytes()


def load(path):
    """The library with its functions' types."""
    lib = ctypes.CDLL(str(path))
    chip, u8, u16, u32, u64 = (
        ctypes.c_void_p,
        ctypes.c_uint8,
        ctypes.c_uint16,
        ctypes.c_uint32,
        ctypes.c_uint64,
    )
    cpu, flag, number = ctypes.c_uint, ctypes.c_bool, ctypes.c_int
    blob, out8, out64 = ctypes.c_char_p, ctypes.POINTER(u8), ctypes.POINTER(u64)
    signatures = {
        "irqchip_create": (chip, cpu),
        "irqchip_destroy": (None, chip),
        "irqchip_reset": (None, chip, u64),
        "irqchip_create_pit": (None, chip, u32, u64),
        "irqchip_remove_pit": (None, chip),
        "irqchip_set_route": (number, chip, cpu, cpu, cpu),
        "irqchip_set_tsc": (None, chip, cpu, u64, u64),
        "irqchip_tsc": (u64, chip, cpu, u64),
        "irqchip_set_gsi": (number, chip, cpu, flag),
        "irqchip_msi": (number, chip, u64, u32),
        "irqchip_local": (flag, chip, cpu, number),
        "irqchip_acknowledge": (number, chip, cpu),
        "irqchip_take_events": (u8, chip, cpu, u8),
        "irqchip_init_cpu": (None, chip, cpu),
        "irqchip_get_cr8": (u64, chip, cpu),
        "irqchip_set_cr8": (None, chip, cpu, u64),
        "irqchip_owns_port": (flag, chip, u16),
        "irqchip_read_port": (flag, chip, u16, out8, u64),
        "irqchip_write_port": (flag, chip, u16, u8, u64),
        "irqchip_lapic_mapped": (flag, chip, cpu, out64),
        "irqchip_lapic_read": (u32, chip, cpu, u32, cpu, u64),
        "irqchip_lapic_write": (None, chip, cpu, u32, cpu, u32, u64),
        "irqchip_owns_msr": (flag, u32),
        "irqchip_read_msr": (number, chip, cpu, u32, out64, u64),
        "irqchip_write_msr": (number, chip, cpu, u32, u64, u64),
        "irqchip_ioapic_base": (u64, chip),
        "irqchip_ioapic_read": (u64, chip, u32, cpu),
        "irqchip_ioapic_write": (None, chip, u32, cpu, u64, u64),
        "irqchip_get_lapic": (None, chip, cpu, blob, u64),
        "irqchip_set_lapic": (number, chip, cpu, blob, u64),
        "irqchip_set_apic_base": (number, chip, cpu, u64, u64),
        "irqchip_get_chip": (number, chip, blob),
        "irqchip_set_chip": (number, chip, blob),
        "irqchip_get_pit": (None, chip, blob, u64),
        "irqchip_set_pit": (number, chip, blob, flag, u64),
        "shim_next_deadline": (u64, chip),
        "shim_advance": (None, chip, u64),
        "shim_pending": (number, chip, cpu),
        "shim_events": (u8, chip, cpu),
        "shim_sipi_vector": (u8, chip, cpu),
        "shim_now": (u64, chip),
        "shim_set_features": (None, chip, flag, flag, u8),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class GeneralProtection(Exception):
    """An MSR access that faults."""


class Chip:
    """The emulator's chip; `now` is the time of every access, in ns, and is only moved by the test."""

    def __init__(self, lib, cpus=1):
        self.lib, self.cpus, self.now = lib, cpus, 0
        self.ptr = lib.irqchip_create(cpus)
        assert self.ptr
        self.transcript = []

    def close(self):
        self.lib.irqchip_destroy(self.ptr)
        self.ptr = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # time
    def advance(self, ns):
        """Let `ns` pass."""
        self.now += ns
        self.lib.shim_advance(self.ptr, self.now)

    @property
    def deadline(self):
        return self.lib.shim_next_deadline(self.ptr)

    # registers
    def outb(self, port, value):
        assert self.lib.irqchip_write_port(self.ptr, port, value, self.now)

    def inb(self, port):
        value = ctypes.c_uint8(0)
        assert self.lib.irqchip_read_port(self.ptr, port, ctypes.byref(value), self.now)
        return value.value

    def _has_registers(self, cpu):
        """Whether the LAPIC answers accesses to memory; the core asks before each, as its contract says."""
        return self.lib.irqchip_lapic_mapped(self.ptr, cpu, ctypes.byref(ctypes.c_uint64(0)))

    def store(self, address, value, cpu=0):
        if address >> 12 == LAPIC >> 12:
            if not self._has_registers(cpu):
                return
            self.lib.irqchip_lapic_write(self.ptr, cpu, address & 0xFFF, 4, value, self.now)
        else:
            self.lib.irqchip_ioapic_write(self.ptr, address & 0xFFF, 4, value, self.now)

    def load(self, address, cpu=0, size=4):
        if address >> 12 == LAPIC >> 12:
            if not self._has_registers(cpu):
                return (1 << 8 * size) - 1
            return self.lib.irqchip_lapic_read(self.ptr, cpu, address & 0xFFF, size, self.now)
        return self.lib.irqchip_ioapic_read(self.ptr, address & 0xFFF, size)

    def rdmsr(self, msr, cpu=0):
        value = ctypes.c_uint64(0)
        if self.lib.irqchip_read_msr(self.ptr, cpu, msr, ctypes.byref(value), self.now):
            raise GeneralProtection(hex(msr))
        return value.value

    def wrmsr(self, msr, value, cpu=0):
        if self.lib.irqchip_write_msr(self.ptr, cpu, msr, value, self.now):
            raise GeneralProtection(hex(msr))

    # interrupts
    def line(self, gsi, level):
        return self.lib.irqchip_set_gsi(self.ptr, gsi, level)

    def msi(self, address, data):
        return self.lib.irqchip_msi(self.ptr, address, data)

    def pending(self, cpu=0):
        return self.lib.shim_pending(self.ptr, cpu)

    def acknowledge(self, cpu=0):
        return self.lib.irqchip_acknowledge(self.ptr, cpu)

    def window(self):
        """The first 4 vectors that CPU 0 takes when it opens its interrupt flag, in order."""
        vectors = []
        while self.pending() >= 0 and len(vectors) < 4:
            vectors.append(self.acknowledge())
        return vectors

    def events(self, cpu=0):
        return self.lib.shim_events(self.ptr, cpu)

    # state
    def get_chip(self, which):
        blob = ctypes.create_string_buffer(struct.pack("<II", which, 0), 520)
        assert self.lib.irqchip_get_chip(self.ptr, blob) == 0
        return blob.raw[8:]

    def set_chip(self, which, data):
        return self.lib.irqchip_set_chip(self.ptr, struct.pack("<II", which, 0) + data.ljust(512, b"\0"))

    def get_lapic(self, cpu=0):
        blob = ctypes.create_string_buffer(1024)
        self.lib.irqchip_get_lapic(self.ptr, cpu, blob, self.now)
        return blob.raw

    def set_lapic(self, data, cpu=0):
        return self.lib.irqchip_set_lapic(self.ptr, cpu, data, self.now)

    def get_pit(self):
        blob = ctypes.create_string_buffer(112)
        self.lib.irqchip_get_pit(self.ptr, blob, self.now)
        return blob.raw

    def set_pit(self, data, restart=False):
        return self.lib.irqchip_set_pit(self.ptr, data, restart, self.now)

    def run(self, script):
        """As Kvm.run."""
        results = []
        for op, *arguments in script:
            try:
                results.append(getattr(self, op)(*arguments))
            except GeneralProtection:
                results.append("#GP")
        return results


def pic_state(data):
    """struct kvm_pic_state as a dict."""
    return dict(zip(PIC_FIELDS, data[:16], strict=True))


def ioapic_state(data):
    """struct kvm_ioapic_state as a dict; redirtbl as 24 numbers."""
    base, select, ident, irr, _ = struct.unpack_from("<QIIII", data)
    return {
        "base": base,
        "ioregsel": select,
        "id": ident,
        "irr": irr,
        "redirtbl": list(struct.unpack_from("<24Q", data, 24)),
    }


def pit_state(data):
    """struct kvm_pit_state2: three dicts and the flags."""
    channels = [dict(zip(PIT_FIELDS, PIT_CHANNEL.unpack_from(data, 24 * i), strict=True)) for i in range(3)]
    return channels, struct.unpack_from("<I", data, 72)[0]


def lapic_registers(data):
    """struct kvm_lapic_state as {offset: value} of the registers that are not 0."""
    values = {offset: struct.unpack_from("<I", data, offset)[0] for offset in range(0, 1024, 16)}
    return {offset: value for offset, value in values.items() if value}


def lapic_blob(registers):
    """The reverse of lapic_registers."""
    data = bytearray(1024)
    for offset, value in registers.items():
        struct.pack_into("<I", data, offset, value)
    return bytes(data)


def vectors(registers, base):
    """The vectors set in the 256-bit register at `base` (0x100 ISR, 0x180 TMR, 0x200 IRR)."""
    return [v for v in range(256) if registers.get(base + 16 * (v // 32), 0) >> v % 32 & 1]


def program(chip, channel, mode, count, bcd=0):
    """Control word and 16-bit count; the time of it."""
    chip.outb(0x43, channel << 6 | 0x30 | mode << 1 | bcd)
    chip.outb(0x40 + channel, count & 0xFF)
    chip.outb(0x40 + channel, count >> 8)
    return chip.now


def latch(chip, channel):
    chip.outb(0x43, channel << 6)
    low = chip.inb(0x40 + channel)
    return low | chip.inb(0x40 + channel) << 8


# --- KVM --------------------------------------------------------------------------------------------------


def _io(number):
    return 0xAE00 | number


def _iow(number, size):
    return 1 << 30 | size << 16 | 0xAE00 | number


def _ior(number, size):
    return 2 << 30 | size << 16 | 0xAE00 | number


def _iowr(number, size):
    return 3 << 30 | size << 16 | 0xAE00 | number


KVM_EXIT_IO = 2
OPS = {"outb": 1, "inb": 2, "store": 3, "load": 4, "rdmsr": 5, "wrmsr": 6, "window": 7}
SEGMENT = struct.Struct("<QIH9BB")
KVM_SREGS = 312


def why_no_kvm():
    """None if /dev/kvm can give what Kvm needs, else the reason."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR)
    except OSError as error:
        return f"/dev/kvm: {os.strerror(error.errno)}"
    try:
        for name, extension in (("KVM_CAP_IRQCHIP", 0), ("KVM_CAP_PIT2", 33), ("KVM_CAP_SIGNAL_MSI", 77)):
            if fcntl.ioctl(fd, _io(0x03), extension) <= 0:
                return f"/dev/kvm has no {name}"
    finally:
        os.close(fd)
    return None


class Kvm:
    """A VM on /dev/kvm with in-kernel interrupt controllers and `cpus` CPUs, of which CPU 0 runs scripts."""

    def __init__(self, guest, cpus=1):
        self.cpus, self.fds = cpus, []
        self.kvm = self._keep(os.open("/dev/kvm", os.O_RDWR))
        self.vm = self._keep(fcntl.ioctl(self.kvm, _io(0x01), 0))
        fcntl.ioctl(self.vm, _io(0x47), 0x70000000)  # KVM_SET_TSS_ADDR
        fcntl.ioctl(self.vm, _io(0x60))  # KVM_CREATE_IRQCHIP
        fcntl.ioctl(self.vm, _iow(0x77, 64), struct.pack("<16I", 1, *[0] * 15))  # KVM_CREATE_PIT2, speaker
        self.ram = mmap.mmap(-1, 0x100000)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        fcntl.ioctl(self.vm, _iow(0x46, 32), struct.pack("<IIQQQ", 0, 0, 0, len(self.ram), address))
        self.vcpus = [self._keep(fcntl.ioctl(self.vm, _io(0x41), i)) for i in range(cpus)]
        self._set_cpuid()
        self.shared = mmap.mmap(self.vcpus[0], fcntl.ioctl(self.kvm, _io(0x04)))
        self.ram[0x1000 : 0x1000 + len(guest)] = guest
        for vector in range(256):
            struct.pack_into("<HHHH", self.ram, 0x8000 + 8 * vector, 0x2000 + 16 * vector, 8, 0x8E00, 0)
        struct.pack_into("<QQQ", self.ram, 0x7800, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
        self._set_flat_mode()

    def _keep(self, fd):
        self.fds.append(fd)
        return fd

    def close(self):
        self.shared.close()
        for fd in reversed(self.fds):
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _set_cpuid(self):
        """All that KVM supports: x2APIC and the TSC deadline timer among it."""
        table = bytearray(struct.pack("<II", 200, 0) + bytes(200 * 40))
        fcntl.ioctl(self.kvm, _iowr(0x05, 8), table)  # KVM_GET_SUPPORTED_CPUID
        count = struct.unpack_from("<I", table)[0]
        for i in range(count):
            function = struct.unpack_from("<I", table, 8 + 40 * i)[0]
            if function == 1:
                ecx = struct.unpack_from("<I", table, 8 + 40 * i + 20)[0]
                struct.pack_into("<I", table, 8 + 40 * i + 20, ecx | 1 << 21 | 1 << 24)
        for vcpu in self.vcpus:
            fcntl.ioctl(vcpu, _iow(0x90, 8), table)  # KVM_SET_CPUID2

    def _set_flat_mode(self):
        sregs = bytearray(KVM_SREGS)
        fcntl.ioctl(self.vcpus[0], _ior(0x83, KVM_SREGS), sregs)
        for i in range(8):  # cs ds es fs gs ss tr ldt
            if i < 6:
                selector, kind = (8, 11) if i == 0 else (16, 3)
                SEGMENT.pack_into(sregs, 24 * i, 0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        struct.pack_into("<QHHHH", sregs, 192, 0x7800, 23, 0, 0, 0)  # gdt
        struct.pack_into("<QHHHH", sregs, 208, 0x8000, 2047, 0, 0, 0)  # idt
        struct.pack_into("<Q", sregs, 224, 0x11)  # cr0: PE, ET
        fcntl.ioctl(self.vcpus[0], _iow(0x84, KVM_SREGS), bytes(sregs))

    def run(self, script):
        """Run (op, argument, ...) rows on CPU 0: the result of each (None for writes, "#GP" for a fault)."""
        for i, (op, *arguments) in enumerate([*script, ("end",)]):
            address, value = (*arguments, 0, 0)[:2]
            struct.pack_into(
                "<IIII", self.ram, 0x10000 + 16 * i, OPS.get(op, 0), address, value & 0xFFFFFFFF, value >> 32
            )
        regs = [0] * 18
        regs[16], regs[17] = 0x1000, 2
        fcntl.ioctl(self.vcpus[0], _iow(0x82, 144), struct.pack("<18Q", *regs))
        while self._exit_port() != 0xF4:
            pass
        return [self._result(i, op) for i, (op, *_) in enumerate(script)]

    def _exit_port(self):
        fcntl.ioctl(self.vcpus[0], _io(0x80))
        reason = struct.unpack_from("<I", self.shared, 8)[0]
        assert reason == KVM_EXIT_IO, f"KVM exit {reason}: {self.shared[32:64].hex()}"
        return struct.unpack_from("<H", self.shared, 34)[0]

    def _result(self, index, op):
        low, high = struct.unpack_from("<II", self.ram, 0x40000 + 8 * index)
        if op == "window":
            return [low >> 8 * (high - 1 - i) & 0xFF for i in range(high)]
        if op in ("rdmsr", "wrmsr") and high == 0xDEAD:
            return "#GP"
        return {"inb": low, "load": low, "rdmsr": low | high << 32}.get(op)

    def line(self, gsi, level):
        fcntl.ioctl(self.vm, _iow(0x61, 8), struct.pack("<II", gsi, level))

    def msi(self, address, data):
        """The number of CPUs that took it.  KVM says -1, EPERM's number, for some ways not to match."""
        message = bytearray(struct.pack("<IIIII12x", address, 0, data, 0, 0))
        try:
            return fcntl.ioctl(self.vm, _iow(0xA5, 32), message)
        except PermissionError:
            return 0

    def get_chip(self, which):
        blob = bytearray(struct.pack("<II", which, 0) + bytes(512))
        fcntl.ioctl(self.vm, _iowr(0x62, 520), blob)
        return bytes(blob[8:])

    def set_chip(self, which, data):
        fcntl.ioctl(
            self.vm, _ior(0x63, 520), bytearray(struct.pack("<II", which, 0) + data.ljust(512, b"\0"))
        )
        return 0

    def get_lapic(self, cpu=0):
        blob = bytearray(1024)
        fcntl.ioctl(self.vcpus[cpu], _ior(0x8E, 1024), blob)
        return bytes(blob)

    def set_lapic(self, data, cpu=0):
        try:
            fcntl.ioctl(self.vcpus[cpu], _iow(0x8F, 1024), bytearray(data))
        except OSError as error:
            return -error.errno
        return 0

    def get_pit(self):
        blob = bytearray(112)
        fcntl.ioctl(self.vm, _ior(0x9F, 112), blob)
        return bytes(blob)

    def set_pit(self, data, restart=True):
        assert restart
        fcntl.ioctl(self.vm, _iow(0xA0, 112), data)
        return 0


EINVAL = errno.EINVAL
