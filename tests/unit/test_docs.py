"""The reference has a section a file, with the permissions that the file has, and no section too many."""

import re
from pathlib import Path

from vmfs.fs.files import CPU_FILES, FILES, OWN_FILES, ROOT_FILES, SNAPSHOT_FILES, snapshot_file
from vmfs.machine.files.commands import COMMANDS
from vmfs.words.exits import DEBUG_CAUSES, EXITS, SHUTDOWN_CAUSES

TEXT = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
ROOT_SECTIONS, SECTIONS = (
    dict(re.findall(r"^### `([^`]+)` \((.*)\)$", part, re.MULTILINE)) for part in TEXT.split("\n## Kinds of files\n")
)
DEVICE_NAMES = {f"dev/NAME/{row.name}": row for rows in OWN_FILES.values() for row in rows}
DIRECTORIES = {"NAME/", "reg/NAME", "dev/NAME/", *DEVICE_NAMES, "dev/add", "dev/unclaimed", "snap/NAME/"}
SNAPSHOT_ROWS = *SNAPSHOT_FILES, *(snapshot_file(f"{folder}/NAME") for folder in ("disks", "images", "history"))
SNAPSHOT_SECTIONS = {f"snap/NAME/{row.name}": row for row in SNAPSHOT_ROWS}


def test_every_file_has_its_section_and_every_section_its_file():
    assert set(ROOT_SECTIONS) - DIRECTORIES == {row.name for row in ROOT_FILES}
    names = {row.name for row in FILES} | {f"cpuN/{row.name}" for row in CPU_FILES} | SNAPSHOT_SECTIONS.keys()
    assert set(SECTIONS) - DIRECTORIES == names


def test_sections_say_the_permissions():
    for rows, sections in ((FILES, SECTIONS), (ROOT_FILES, ROOT_SECTIONS)):
        for row in rows:
            assert sections[row.name].startswith(f"{row.mode:04o}, "), row.name
    for name, row in SNAPSHOT_SECTIONS.items():
        assert SECTIONS[name].startswith(f"{row.mode:04o}, "), name
    assert DEVICE_NAMES.keys() <= SECTIONS.keys()
    for row in CPU_FILES:
        assert SECTIONS[f"cpuN/{row.name}"].startswith(f"{row.mode:04o}, "), row.name


def test_every_verb_is_in_its_section():
    for name, commands in COMMANDS.items():
        section = TEXT.split(f"### `{name}` ")[1].split("\n### ")[0]
        for command in commands:
            if command.name:
                assert f"`{command.name}" in section, f"{name}: {command.usage}"


def test_every_exit_is_in_the_table():
    for exit_ in EXITS:
        assert re.search(rf"^\| `{exit_.REASON}\b", TEXT, re.MULTILINE), exit_.REASON
    for cause in SHUTDOWN_CAUSES:
        assert cause in TEXT
    for cause in DEBUG_CAUSES:
        assert f"cause={cause}" in TEXT
