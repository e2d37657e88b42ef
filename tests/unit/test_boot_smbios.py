"""SMBIOS tables: as dmidecode reads them, and by their own sums."""

import shutil
import struct
import subprocess
import uuid

import pytest

from vmfs.boot import Platform, firmware_files, smbios

UUID = uuid.UUID("e665dd5d-4f41-4990-834d-bdf477f56635")
PLATFORM = Platform(256 << 20, cpus=2, uuid=UUID.bytes, processor_id=bytes.fromhex("a1060600 fffb8b17"),
                    processor="A processor")  # fmt: skip


def dmidecode(path, platform, *options):
    """What it says of a dump: the entry point at 0, the structures at 32."""
    assert shutil.which("dmidecode"), "scripts/setup.sh installs it"
    path.write_bytes(smbios.for_memory(platform, 0))
    done = subprocess.run(["dmidecode", "--from-dump", path, *options], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_dmidecode_reads_all_of_it(tmp_path):
    said = dmidecode(tmp_path / "dump", PLATFORM)
    for words in (
        "SMBIOS 2.8 present.", "Vendor: vmfs", "System is a virtual machine", "ACPI is supported",
        f"UUID: {UUID}", "Manufacturer: vmfs", "Wake-up Type: Power Switch", "Version: A processor", "Core Count: 2",
        "ID: A1 06 06 00 FF FB 8B 17", "Maximum Capacity: 256 MB", "Size: 256 MB", "Form Factor: DIMM",
        "Starting Address: 0x00000000000", "Ending Address: 0x0000FFFFFFF", "Status: No errors detected",
        "End Of Table",
    ):  # fmt: skip
        assert words in said, said
    assert not any(words in said for words in ("Wrong", "Invalid", "OUT OF SPEC", "BAD INDEX", "TRUNCATED")), said


@pytest.mark.parametrize(("gib", "sizes", "ends"), [
    (6, ["6 GB"], ["0x000DFFFFFFF", "0x0019FFFFFFF"]),
    (40, ["16 GB", "16 GB", "8 GB"], ["0x000DFFFFFFF", "0x00A1FFFFFFF"]),
    (6 << 10, ["16 GB"] * 384, ["0x000DFFFFFFF", "0x000006001FFFFFFFk"]),
])  # fmt: skip
def test_memory_above_its_holes(tmp_path, gib, sizes, ends):
    said = dmidecode(tmp_path / "dump", Platform(gib << 30), "-t", "16,17,19").splitlines()
    value = [line.strip().partition(": ") for line in said]
    assert [text for name, _, text in value if name == "Size"] == sizes
    assert [text for name, _, text in value if name == "Ending Address"] == ends


def test_firmware_describes_itself():
    files = firmware_files(PLATFORM)
    data, anchor = files["etc/smbios/smbios-tables"], files["etc/smbios/smbios-anchor"]
    assert data[0] == 1, "no type 0, which firmware adds"
    assert anchor[:4] == b"_SM_" and len(anchor) == anchor[5] == 31 and anchor[16:21] == b"_DMI_"
    assert struct.unpack_from("<HI", anchor, 22) == (len(data), 0)
    assert sum(anchor) % 256 == sum(anchor[16:]) % 256 == 0
