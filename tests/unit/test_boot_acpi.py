"""ACPI tables: sums, links, and what a disassembler of other people's reads in them."""

import re
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.boot import Platform, acpi, aml, firmware_files, mptable, pirtable
from vmfs.devices import pci, power
from vmfs.devices.chipset import I440FX

BASE = 0xF0040
PLATFORM = Platform(256 << 20)


def table_at(data, base, address):
    """A table, its sum checked."""
    at = address - base
    signature, length = struct.unpack_from("<4sI", data, at)
    table = data[at : at + length]
    assert len(table) == length
    if signature != b"FACS":
        assert sum(table) % 256 == 0
    return table


def by_signature(platform=PLATFORM, base=BASE):
    """Every table, found by the RSDP as an operating system does."""
    made = acpi.tables(platform)
    data, rsdp = made.at(base), made.rsdp(base)
    assert rsdp[:8] == b"RSD PTR " and len(rsdp) == 36
    assert sum(rsdp[:20]) % 256 == 0 and sum(rsdp) % 256 == 0
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, length) == (2, 36)
    found = {"RSDT": table_at(data, base, rsdt), "XSDT": table_at(data, base, xsdt)}
    listed = struct.unpack_from("<2I", found["RSDT"], 36)
    assert listed == struct.unpack_from("<2Q", found["XSDT"], 36)
    for address in listed:
        table = table_at(data, base, address)
        found[table[:4].decode()] = table
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    assert (facs, dsdt) == struct.unpack_from("<QQ", found["FACP"], 132)
    assert facs % 64 == 0
    found["FACS"], found["DSDT"] = table_at(data, base, facs), table_at(data, base, dsdt)
    return found


@pytest.mark.parametrize("base", [0x40, BASE, 0xDFFF_0000])
def test_every_table_is_reached_by_the_rsdp(base):
    found = by_signature(base=base)
    assert found.keys() == {"RSDT", "XSDT", "FACP", "APIC", "FACS", "DSDT"}
    for signature, table in found.items():
        assert table[:4] == signature.encode()
    assert len(found["FACS"]) == 64 and len(found["FACP"]) == 244


def test_fadt_names_the_ports_of_the_devices():
    fadt = by_signature()["FACP"]
    assert struct.unpack_from("<H", fadt, 46) == (power.SCI,)
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # always in ACPI mode
    ports = {56: power.PM1_EVENT, 64: power.PM1_CONTROL, 76: power.PM_TIMER}
    wide = {148: (power.PM1_EVENT, 32), 172: (power.PM1_CONTROL, 16), 208: (power.PM_TIMER, 32), 116: (0xCF9, 8)}
    for offset, port in ports.items():
        assert struct.unpack_from("<I", fadt, offset) == (port,)
    for offset, (port, bits) in wide.items():
        space, width, _, _, address = struct.unpack_from("<BBBBQ", fadt, offset)
        assert (space, width, address) == (1, bits, port)
    assert fadt[128] == 6
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 10 and not flags & 1 << 4


def test_fadt_says_what_is_not_there():
    bare = Platform(64 << 20, serial=(), ps2=False, rtc=False, vga=False, power_button=False)
    fadt = by_signature(bare)["FACP"]
    assert struct.unpack_from("<H", fadt, 109) == (1 << 2 | 1 << 5,)  # no VGA, no RTC; there is MSI
    assert fadt[108] == 0
    assert struct.unpack_from("<I", fadt, 112)[0] & 1 << 4


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_madt(cpus):
    madt = by_signature(Platform(64 << 20, cpus=cpus))["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    at, entries = 44, []
    while at < len(madt):
        entries.append(bytes(madt[at : at + madt[at + 1]]))
        at += madt[at + 1]
    assert at == len(madt)
    assert [entry[3] for entry in entries if entry[0] == 0] == list(range(cpus))
    (ioapic,) = (entry for entry in entries if entry[0] == 1)
    assert struct.unpack_from("<II", ioapic, 4) == (0xFEC0_0000, 0)
    overrides = {entry[3]: struct.unpack_from("<IH", entry, 4) for entry in entries if entry[0] == 2}
    assert overrides == {0: (2, 0), 9: (9, 0xD)}


def test_tables_fit_where_the_loader_puts_them():
    assert len(acpi.tables(Platform(64 << 20, cpus=255)).data) < 0xFC00 - 64


# ---- the multiprocessor tables (Intel MultiProcessor Specification 1.4, chapter 4)


@pytest.mark.parametrize("cpus", [1, 3])
def test_mp_table(cpus):
    table = mptable.table(Platform(64 << 20, cpus=cpus), 0xF1230)
    assert table[:4] == b"_MP_" and sum(table[:16]) % 256 == 0
    assert struct.unpack_from("<IBB", table, 4) == (0xF1240, 1, 4)
    config = table[16:]
    signature, length, revision = struct.unpack_from("<4sHB", config)
    count, lapic = struct.unpack_from("<HI", config, 34)
    assert (signature, length, revision, lapic) == (b"PCMP", len(config), 4, 0xFEE0_0000)
    assert sum(config) % 256 == 0
    entries, at = [], 44
    while at < len(config):
        size = 20 if config[at] == 0 else 8
        entries.append(config[at : at + size])
        at += size
    assert at == len(config) and len(entries) == count
    assert [(entry[1], entry[3] & 3) for entry in entries if entry[0] == 0] == [(0, 3), (1, 1), (2, 1)][:cpus]
    assert [(entry[1], entry[2:8]) for entry in entries if entry[0] == 1] == [(0, b"PCI   "), (1, b"ISA   ")]
    routes = {(entry[4], entry[5]): entry[7] for entry in entries if entry[0] == 3}
    assert {key[1]: to for key, to in routes.items() if key[0] == 1} == {
        line: line or 2 for line in range(16) if line != 2
    }
    assert {key[1]: to for key, to in routes.items() if key[0] == 0} == {
        slot << 2: I440FX.gsi(slot) for slot in range(1, 32)
    }
    assert [(entry[1], entry[7]) for entry in entries if entry[0] == 4] == [(3, 0), (1, 1)]


# ---- $PIR


def test_the_routing_table_names_the_routers_registers():
    table = pirtable.table(I440FX)
    signature, version, size, bus, place, _, vendor, device = struct.unpack_from("<4sHHBBHHH", table)
    assert (signature, version, size, bus, place) == (b"$PIR", 0x100, len(table), 0, I440FX.isa_slot << 3)
    assert (vendor, device) == (0x8086, 0x7000) and sum(table) % 256 == 0
    rows = [struct.unpack_from("<BBBHBHBHBHB", table, at) for at in range(32, len(table), 16)]
    assert [row[1] >> 3 for row in rows] == list(range(1, 32))
    for bus, place, *pins, number in rows:
        assert (bus, number) == (0, 0) and set(pins[1::2]) == {0xDEF8}
        assert pins[::2] == [0x60 + ((place >> 3) - 1 + pin) % 4 for pin in range(4)]


# ---- for firmware


def run_loader(files, zones):
    """What firmware does with etc/table-loader: memory by file name, as (address, bytes)."""
    script, memory = files["etc/table-loader"], {}
    for at in range(0, len(script), 128):
        command = script[at : at + 128]
        (number,) = struct.unpack_from("<I", command)
        names = [command[at : at + 56].partition(b"\0")[0].decode("latin-1") for at in (4, 60)]
        if number == 1:
            align, zone = struct.unpack_from("<IB", command, 60)
            assert zones[zone] % align == 0
            memory[names[0]] = zones[zone], bytearray(files[names[0]])
        elif number == 2:
            offset, size = struct.unpack_from("<IB", command, 116)
            _, blob = memory[names[0]]
            value = int.from_bytes(blob[offset : offset + size], "little") + memory[names[1]][0]
            blob[offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert number == 3
            offset, start, length = struct.unpack_from("<III", command, 60)
            _, blob = memory[names[0]]
            assert start + length <= len(blob) and start <= offset < start + length
            blob[offset] = blob[offset] - sum(blob[start : start + length]) & 0xFF
    return memory


def test_firmware_makes_the_same_tables():
    made, files = acpi.tables(PLATFORM), firmware_files(PLATFORM)
    memory = run_loader(files, {1: 0xFFF_0000, 2: 0xF_6000})
    assert memory["etc/acpi/tables"] == (0xFFF_0000, made.at(0xFFF_0000))
    assert memory["etc/acpi/rsdp"] == (0xF_6000, made.rsdp(0xFFF_0000))
    assert struct.unpack("<QQI", files["etc/e820"]) == (0, 256 << 20, 1)


# ---- AML


@given(st.integers(0, (1 << 28) - 5))
def test_package_length(size):
    data = aml.package_length(size)
    more = data[0] >> 6
    assert len(data) == more + 1
    if more:
        value = data[0] & 15 | int.from_bytes(data[1:], "little") << 4
        assert not data[0] & 0x30
    else:
        value = data[0]
    assert value == size + len(data)


def test_names_integers_ids():
    assert aml.name_string("\\_SB") == b"\\_SB_"
    assert aml.name_string("\\_SB.PCI0") == b"\\\x2e_SB_PCI0"
    assert aml.name_string("A.B.C") == b"\x2f\x03A___B___C___"
    assert aml.name_string("\\") == b"\\\0"
    values = {0: "00", 1: "01", 2: "0a02", 256: "0b0001", 1 << 16: "0c00000100", 1 << 32: "0e0000000001000000"}
    for value, code in values.items():
        assert aml.integer(value).hex() == code
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"  # 0x030AD041, as every PC's _HID has it
    with pytest.raises(ValueError):
        aml.integer(1 << 64)
    with pytest.raises(ValueError):
        aml.name_string("TOOLONG")


@pytest.fixture(scope="module")
def dsdt_source(tmp_path_factory):
    """The DSDT as ACPICA's disassembler reads it; it then compiles again without a warning."""
    if not shutil.which("iasl"):
        pytest.skip("iasl is missing: Debian's package acpica-tools")
    folder = tmp_path_factory.mktemp("acpi")
    (folder / "dsdt.dat").write_bytes(by_signature()["DSDT"])
    done = subprocess.run(["iasl", "-d", "dsdt.dat"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(["iasl", "-p", "again", "dsdt.dsl"], cwd=folder, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings" in done.stdout, done.stdout + done.stderr
    return re.sub(r"/\*.*?\*/|//[^\n]*|\s+", " ", (folder / "dsdt.dsl").read_text(), flags=re.DOTALL)


def test_dsdt_powers_off(dsdt_source):
    assert re.search(r"Name \( ?\\_S5, Package \(0x04\) \{ Zero, Zero, ", re.sub(" +", " ", dsdt_source))


def test_dsdt_routes_every_slot(dsdt_source):
    text = re.sub(" +", "", dsdt_source)
    rows = re.findall(r"Package\(0x04\)\{0x(\w{4})FFFF,Zero,(?:Zero,0x(\w+)|LNK(.),Zero)\}", text)
    slots = range(1, pci.SLOTS)
    assert [(int(slot, 16), link) for slot, _, link in rows if link] == [(slot, "DABC"[slot % 4]) for slot in slots]
    assert [(int(slot, 16), int(to, 16)) for slot, to, _ in rows if to] == [(slot, 16 + slot % 8) for slot in slots]
    assert len(rows) == 2 * len(slots) and "If(PICF){Return(APIR)}Return(PICR)" in text


def interpret(tmp_path, *commands):
    """What ACPICA's interpreter says of the DSDT; regions of configuration space are bytes that it keeps."""
    if not shutil.which("acpiexec"):
        pytest.skip("acpiexec is missing: Debian's package acpica-tools")
    (tmp_path / "dsdt.dat").write_bytes(by_signature()["DSDT"])
    lines = "".join(f"execute {command}\n" for command in commands) + "quit\n"
    done = subprocess.run(["acpiexec", "dsdt.dat"], cwd=tmp_path, input=lines, capture_output=True, text=True)
    assert done.returncode == 0 and "AE_" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("link", "ABCD")
def test_links_route(tmp_path, link):
    """What is set is what is; off, and on again."""
    name = f"\\_SB.LNK{link}"
    said = interpret(
        tmp_path,
        *(f"{name}.{method}" for method in ("_DIS", "_STA", "_CRS", "_SRS (23 00 08 18 79 00)", "_STA", "_CRS")),
    )
    values = re.findall(r"\[Integer\] = 0*(\w+)|0000: ((?:\w\w ){6})", said)
    off, on = "23 00 00 18 79 00", "23 00 08 18 79 00"  # none; IRQ 11: level-triggered, active low, shared
    assert [number or text.strip() for number, text in values] == ["9", off, "B", on], said


def test_dsdt_lists_the_devices(dsdt_source):
    text = re.sub(" +", "", dsdt_source)
    for hid, number in {"PNP0A03": 1, "PNP0501": 4, "PNP0303": 1, "PNP0F13": 1, "PNP0B00": 1, "PNP0C02": 1}.items():
        assert text.count(f'EisaId("{hid}")') == number
    for port, line in PLATFORM.serial:
        assert f"IO(Decode16,0x{port:04X},0x{port:04X},0x01,0x08,)IRQNoFlags(){{{line}}}" in text
    assert "0xE0000000,0xFEBFFFFF,0x00000000,0x1EC00000" in text
    assert "0x0000,0x0CF7,0x0000,0x0CF8" in text and "0x0D00,0xFFFF,0x0000,0xF300" in text
