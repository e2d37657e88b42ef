"""ACPI tables: what a kernel without other knowledge of the machine finds PCI, the interrupts and the power switch by.

`tables` makes them position-independent. `Tables.at` gives the bytes for a place in RAM; `Tables.for_firmware` the
three files by which SeaBIOS, or other firmware that reads fw_cfg, puts them where it likes.

Source: ACPI Specification 6.4: 5.2 (tables), 4.8.3 (fixed hardware), 6.2.13 (_PRT), 7.4.2.5 (\\_S5). The loader's
commands: QEMU's docs of the fw_cfg interface "etc/table-loader", as SeaBIOS's src/fw/romfile_loader.h has them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from vmfs.boot import aml
from vmfs.boot.platform import Platform
from vmfs.devices import hpet, pci, power, smbus, vmgenid
from vmfs.devices.chipset import ECAM_SIZE, MEMORY_END, Chipset

OEM, OEM_TABLE, CREATOR = b"VMFS  ", b"VMFS PC ", b"VMFS"

IOAPIC, LAPIC = 0xFEC0_0000, 0xFEE0_0000
PIT_GSI = 2  # where IRQ 0 is, as on every PC with an IOAPIC
_CENTURY = 0x32  # the RTC's register for it
_RESET_PORT, _RESET_VALUE = 0xCF9, 6
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
LEVEL_HIGH = 0x000D  # MPS INTI flags (5.2.12.5): level-triggered, active high


@dataclass(slots=True)
class Tables:
    """All tables in one piece of memory, with what depends on its address: pointers and checksums."""

    data: bytearray = field(default_factory=bytearray)
    pointers: list[tuple[int, int]] = field(default_factory=list)  # offset, bytes; what is there is an offset
    checksums: list[tuple[int, int, int]] = field(default_factory=list)  # offset of the sum, start, length
    xsdt: int = 0
    rsdt: int = 0

    def add(self, signature: bytes, revision: int, body: bytes, pointers: tuple[tuple[int, int], ...] = ()) -> int:
        """Append a table with the standard header (5.2.6); `pointers` are offsets in it. Its own offset."""
        at = self._align(16)
        length = _HEADER.size + len(body)
        self.data += _HEADER.pack(signature, length, revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1) + body
        self.pointers += [(at + offset, size) for offset, size in pointers]
        self.checksums.append((at + 9, at, length))
        return at

    def add_facs(self) -> int:
        """The firmware's control structure (5.2.10), which has no checksum and is aligned to 64 bytes."""
        at = self._align(64)
        self.data += struct.pack("<4sIIIIIQBxxxI", b"FACS", 64, 0, 0, 0, 0, 0, 2, 0).ljust(64, b"\0")
        return at

    def _align(self, boundary: int) -> int:
        self.data += bytes(-len(self.data) % boundary)
        return len(self.data)

    def at(self, address: int) -> bytes:
        """The tables for `address`, a multiple of 64."""
        data = bytearray(self.data)
        for offset, size in self.pointers:
            value = int.from_bytes(data[offset : offset + size], "little") + address
            data[offset : offset + size] = value.to_bytes(size, "little")
        for offset, start, length in self.checksums:
            data[offset] = checksum(data[start : start + length])
        return bytes(data)

    def rsdp(self, address: int) -> bytes:
        """The root pointer (5.2.5.3) of tables at `address`; it belongs on a multiple of 16 in E0000-FFFFF."""
        data = bytearray(_rsdp(address + self.rsdt, address + self.xsdt))
        data[8] = checksum(data[:20])
        data[32] = checksum(data)
        return bytes(data)

    def for_firmware(self) -> dict[str, bytes]:
        """The files of fw_cfg."""
        tables, root = "etc/acpi/tables", "etc/acpi/rsdp"
        commands = [_allocate(tables, 64, _ZONE_HIGH), _allocate(root, 16, _ZONE_FSEG)]
        commands += [_add_pointer(tables, tables, offset, size) for offset, size in self.pointers]
        commands += [_add_checksum(tables, *one) for one in self.checksums]
        commands += [_add_pointer(root, tables, 16, 4), _add_pointer(root, tables, 24, 8)]
        commands += [_add_checksum(root, 8, 0, 20), _add_checksum(root, 32, 0, 36)]
        return {
            tables: bytes(self.data),
            root: _rsdp(self.rsdt, self.xsdt),
            "etc/table-loader": b"".join(commands),
        }


def checksum(data: bytes | bytearray) -> int:
    """What makes the sum of the bytes zero, given that it is one of them and 0 now."""
    return -sum(data) & 0xFF


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    return struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, rsdt, 36, xsdt, 0)


def tables(platform: Platform) -> Tables:
    """The tables of a machine."""
    made = Tables()
    facs = made.add_facs()
    dsdt = made.add(b"DSDT", 2, _dsdt(platform))
    fadt = made.add(b"FACP", 3, _fadt(platform, facs, dsdt), ((36, 4), (40, 4), (132, 8), (140, 8)))
    madt = made.add(b"APIC", 3, _madt(platform))
    listed = (fadt, madt, made.add(b"HPET", 1, _hpet()))
    if platform.chipset.ecam:
        listed = (*listed, made.add(b"MCFG", 1, struct.pack("<8xQHBB4x", platform.chipset.ecam, 0, 0, 0xFF)))
    for name, signature, size, letter in (("rsdt", b"RSDT", 4, "I"), ("xsdt", b"XSDT", 8, "Q")):
        body = struct.pack(f"<{len(listed)}{letter}", *listed)
        pointers = tuple((_HEADER.size + number * size, size) for number in range(len(listed)))
        setattr(made, name, made.add(signature, 1, body, pointers))
    return made


def _port(address: int, bits: int, size: int) -> bytes:
    """A generic address structure (5.2.3.2) in I/O space; `size` 1, 2, 3 for an access of 8, 16, 32 bits."""
    return struct.pack("<BBBBQ", 1, bits, 0, size, address) if address else bytes(12)


def _fadt(platform: Platform, facs: int, dsdt: int) -> bytes:
    """The fixed hardware (5.2.9). There is no SMI_CMD: the machine is always in ACPI mode."""
    legacy, has_8042, no_vga, no_rtc = (1 << bit for bit in (0, 1, 2, 5))
    boot_architecture = (
        (legacy if platform.serial or platform.ps2 else 0)
        | (has_8042 if platform.ps2 else 0)
        | (0 if platform.vga else no_vga)
        | (0 if platform.rtc else no_rtc)
    )
    wbinvd, c1, power_button, sleep_button, reset = (1 << bit for bit in (0, 2, 4, 5, 10))
    # A set button flag means that it is not one of the fixed hardware.
    gpe0, gpe0_length = power.gpe0_port(platform.chipset), 2 * platform.chipset.gpe0_half
    flags = wbinvd | c1 | sleep_button | reset | (0 if platform.power_button else power_button)
    return b"".join(
        (
            struct.pack("<IIBBH", facs, dsdt, 0, 0, power.SCI),
            struct.pack("<IBBBB", 0, 0, 0, 0, 0),  # SMI_CMD, ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
            struct.pack("<8I", power.PM1_EVENT, 0, power.PM1_CONTROL, 0, 0, power.PM_TIMER, gpe0, 0),
            struct.pack("<8B", 4, 2, 0, 4, gpe0_length, 0, 0, 0),  # lengths of those, GPE1_BASE, CST_CNT
            struct.pack("<HHHH", 0xFFFF, 0xFFFF, 0, 0),  # no C2, no C3; no flushing by reading
            struct.pack("<BBBBB", 0, 0, 0, 0, _CENTURY if platform.rtc else 0),  # duty cycle, RTC alarms
            struct.pack("<HBI", boot_architecture, 0, flags),
            _port(_RESET_PORT, 8, 1),
            struct.pack("<BHB", _RESET_VALUE, 0, 0),
            struct.pack("<QQ", facs, dsdt),
            _port(power.PM1_EVENT, 32, 2),
            _port(0, 0, 0),
            _port(power.PM1_CONTROL, 16, 2),
            _port(0, 0, 0),
            _port(0, 0, 0),
            _port(power.PM_TIMER, 32, 3),
            _port(gpe0, 8 * gpe0_length, 1),
            _port(0, 0, 0),
        )
    )


def _hpet() -> bytes:
    """The high precision event timer (IA-PC HPET Specification 1.0a, 3.2.4)."""
    memory, least = 0, hpet.SHORTEST
    place = struct.pack("<BBBBQ", memory, 64, 0, 0, hpet.ADDRESS)
    return struct.pack("<I12sBHB", hpet.CAPABILITIES, place, 0, least, 0)


def _madt(platform: Platform) -> bytes:
    """The interrupt controllers (5.2.12): a LAPIC a CPU, one IOAPIC of GSI 0 to 23, two 8259."""
    pcat_compatible, enabled = 1, 1
    entries = [struct.pack("<II", LAPIC, pcat_compatible)]
    entries += [struct.pack("<BBBBI", 0, 8, number, number, enabled) for number in range(platform.cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, PIT_GSI, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, power.SCI, power.SCI, LEVEL_HIGH))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI is LINT1 of every CPU
    return b"".join(entries)


def _dsdt(platform: Platform) -> bytes:
    a = aml
    chipset = platform.chipset
    devices = [_host_bridge(chipset), *_links(chipset), _board_resources(chipset), _generation_id()]
    devices.append(_isa("HPET", "PNP0103", a.memory_fixed(hpet.ADDRESS, hpet.LENGTH)))
    if platform.rtc:
        devices.append(_isa("RTC", "PNP0B00", a.io(0x70, 8), a.irq(8)))
    if platform.ps2:
        devices.append(_isa("KBD", "PNP0303", a.io(0x60, 1), a.io(0x64, 1), a.irq(1)))
        devices.append(_isa("MOU", "PNP0F13", a.irq(12)))
    for number, (port, line) in enumerate(platform.serial, 1):
        devices.append(_isa(f"COM{number}", "PNP0501", a.io(port, 8), a.irq(line), uid=number))
    for number, (port, line) in enumerate(platform.parallel, 1):
        devices.append(_isa(f"LPT{number}", "PNP0400", a.io(port, 3), a.irq(line), uid=number))
    s5 = a.package(a.integer(power.S5), a.integer(power.S5), a.integer(0), a.integer(0))
    return b"".join(
        (
            a.name("\\_S3", a.package(a.integer(power.S3), a.integer(power.S3), a.integer(0), a.integer(0))),
            a.name("\\_S5", s5),
            a.name("\\PICF", a.integer(0)),
            a.method("\\_PIC", 1, a.store(a.ARG0, a.name_string("\\PICF"))),  # 5.8.1: 1 is the IOAPIC
            a.scope("\\_SB", *devices),
            a.scope("\\_GPE", a.method(f"_E{vmgenid.EVENT:02X}", 0, a.notify("\\_SB.VGEN", _CHANGED))),
        )
    )


_CHANGED = 0x80  # of notifications: what a device says of itself


def _generation_id() -> bytes:
    """Guests look for the identity that the specification names; Linux compares capital letters, as ACPI has them."""
    a = aml
    return a.device(
        "VGEN",
        a.name("_HID", a.string("VMFS0001")),
        a.name("_CID", a.package(a.string("VM_Gen_Counter"), a.string("VMGENCTR"))),
        a.name("_DDN", a.string("VM_Gen_Counter")),
        a.name("ADDR", a.package(a.integer(vmgenid.ADDRESS & 0xFFFF_FFFF), a.integer(vmgenid.ADDRESS >> 32))),
    )


def _isa(name: str, hid: str, *descriptors: bytes, uid: int = 0) -> bytes:
    terms = [aml.name("_HID", aml.eisa_id(hid))]
    if uid:
        terms.append(aml.name("_UID", aml.integer(uid)))
    return aml.device(name, *terms, aml.name("_CRS", aml.resources(*descriptors)))


def _host_bridge(chipset: Chipset) -> bytes:
    a = aml
    names = [a.name("_HID", a.eisa_id("PNP0A03"))]
    if chipset.ecam:
        names = [a.name("_HID", a.eisa_id("PNP0A08")), a.name("_CID", a.eisa_id("PNP0A03"))]
    windows = a.resources(
        a.bus_numbers(0, 0xFF),
        a.io(pci.CONFIG_ADDRESS, 8),
        a.io_space(0, pci.CONFIG_ADDRESS - 1),
        a.io_space(pci.CONFIG_DATA + 4, 0xFFFF),
        a.memory_space(0xA_0000, 0xB_FFFF),
        a.memory_space(chipset.memory_start, MEMORY_END - 1),
    )
    return a.device(
        "PCI0",
        *names,
        a.name("_UID", a.integer(0)),
        a.name("_CRS", windows),
        _isa_bridge(chipset),
        a.name("PICR", _routes(lambda slot: (a.name_string(_LINKS[chipset.wired(slot)]), a.integer(0)))),
        a.name("APIR", _routes(lambda slot: (a.integer(0), a.integer(chipset.gsi(slot))))),
        a.method("_PRT", 0, a.if_(a.name_string("PICF"), a.return_(a.name_string("APIR"))),
                 a.return_(a.name_string("PICR"))),
    )  # fmt: skip


_LINKS, _ROUTES = (tuple(f"{name}{letter}" for letter in "ABCDEFGH") for name in ("LNK", "PRQ"))
_REGISTERS = "PIRR", "PIRS"  # four routes each
_LINK_IRQS = 5, 10, 11  # of those that the router has, the ones that no ISA device of a PC is at
_ROUTES_TO_NONE = 0x80


def _isa_bridge(chipset: Chipset) -> bytes:
    a = aml
    registers = (
        a.config_registers(name, chipset.routes[at], *_ROUTES[at : at + 4])
        for name, at in zip(_REGISTERS, range(0, len(chipset.routes), 4), strict=False)
    )
    return a.device("ISA", a.name("_ADR", a.integer(chipset.isa_slot << 16)), *registers)


def _links(chipset: Chipset) -> list[bytes]:
    """The inputs of the PCI router, of which a system says by `_SRS` to which IRQ they go (6.2)."""
    a = aml
    routes = (a.name_string(f"\\_SB.PCI0.ISA.{name}") for name in _ROUTES[: len(chipset.routes)])
    return [_link(number, name, route) for number, (name, route) in enumerate(zip(_LINKS, routes, strict=False))]


def _link(number: int, name: str, route: bytes) -> bytes:
    a = aml
    off = a.integer(_ROUTES_TO_NONE)
    here, used = a.integer(0x9), a.integer(0xB)  # 6.3.7: there, working; and it decodes
    irq = a.name_string("IRQ0")
    return a.device(
        name,
        a.name("_HID", a.eisa_id("PNP0C0F")),
        a.name("_UID", a.integer(number)),
        a.name("_PRS", a.resources(a.irqs(*_LINK_IRQS))),
        a.name("CURR", a.resources(a.irqs())),
        a.method("_STA", 0, a.if_(a.and_(route, off), a.return_(here)), a.return_(used)),
        a.method("_DIS", 0, a.or_(route, off, route)),
        a.method(
            "_CRS", 0,
            a.word_field(a.name_string("CURR"), a.IRQS_AT, "IRQ0"),
            a.store(route, a.LOCAL0),
            a.if_(a.and_(a.LOCAL0, off), a.store(a.integer(0), irq)),
            a.else_(a.shift_left(a.integer(1), a.and_(a.LOCAL0, a.integer(15)), irq)),
            a.return_(a.name_string("CURR")),
            serialized=True,
        ),
        a.method(
            "_SRS", 1,
            a.word_field(a.ARG0, a.IRQS_AT, "IRQ0"),
            a.find_set_right_bit(irq, a.LOCAL0),
            a.decrement(a.LOCAL0),  # of none: all ones, which is off
            a.store(a.LOCAL0, route),
            serialized=True,
        ),
    )  # fmt: skip


def _routes(source: Callable[[int], tuple[bytes, bytes]]) -> bytes:
    """INTA of every slot, to a link or directly to a GSI (6.2.13)."""
    a = aml
    rows = []
    for slot in range(1, pci.SLOTS):
        address = a.integer(slot << 16 | 0xFFFF)  # any function
        rows.append(a.package(address, a.integer(0), *source(slot)))
    return a.package(*rows)


def _board_resources(chipset: Chipset) -> bytes:
    """Ports and memory that no other device lists, so that a kernel gives them to none."""
    a = aml
    its = [a.memory_fixed(chipset.ecam, ECAM_SIZE)] if chipset.ecam else [a.io(smbus.BASE, smbus.LENGTH)]
    return a.device(
        "MBRD",
        a.name("_HID", a.eisa_id("PNP0C02")),
        a.name(
            "_CRS",
            a.resources(
                a.io(0x510, 12),  # fw_cfg
                a.io(power.PM1_EVENT, chipset.power_length),
                *its,
                a.memory_fixed(IOAPIC, 0x1000),
                a.memory_fixed(LAPIC, 0x1000),
                a.memory_fixed(vmgenid.ADDRESS, vmgenid.LENGTH),
            ),
        ),
    )


# ---- commands of the loader: 128 bytes each, names of 56

_ZONE_HIGH, _ZONE_FSEG = 1, 2


def _command(number: int, arguments: bytes) -> bytes:
    return struct.pack("<I", number) + arguments.ljust(124, b"\0")


def _allocate(file: str, align: int, zone: int) -> bytes:
    return _command(1, struct.pack("<56sIB", file.encode(), align, zone))


def _add_pointer(file: str, target: str, offset: int, size: int) -> bytes:
    return _command(2, struct.pack("<56s56sIB", file.encode(), target.encode(), offset, size))


def _add_checksum(file: str, offset: int, start: int, length: int) -> bytes:
    return _command(3, struct.pack("<56sIII", file.encode(), offset, start, length))
