"""`vmfs save`: a machine, or a snapshot of it, as one file."""

import argparse
import contextlib
import os
from pathlib import Path

from vmfs.commands import archive, machines
from vmfs.words.errors import Invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", metavar="MACHINE[:SNAPSHOT]", help=f"{machines.HELP}; as it is now, "
                        "or as a snapshot has it")
    parser.add_argument("file", metavar="FILE", type=Path, help="what is there already is replaced once it is whole")
    parser.add_argument("--history", action="store_true", help="with its past, as far as `history` has it since it was "
                        "last changed from outside, and with all that was typed in that time")


def run(arguments: argparse.Namespace) -> int:
    machine, name = _parts(arguments.machine)
    taken = None if name else f"save-{os.getpid()}"
    folder = machine / "snap" / (name or taken)
    if not taken:
        _save(arguments, machine, folder)
        return 0
    with archive.removed_if_killed(folder):
        _make(machine, folder)
        try:
            _save(arguments, machine, folder)
        except BaseException:
            with contextlib.suppress(OSError):  # of a machine that is gone
                folder.rmdir()
            raise
        folder.rmdir()
    return 0


def _save(arguments: argparse.Namespace, machine: Path, folder: Path) -> None:
    try:
        if arguments.history and not (folder / archive.PAST).is_dir():
            raise Invalid(f"{arguments.machine} has no past to save: `echo on > {machine}/history` begins one")
        with archive.new_file(arguments.file.absolute()) as file:
            archive.write(folder, file, str(arguments.file), with_past=arguments.history)
    except OSError as failure:
        raise archive.failed(failure.filename or arguments.file, failure) from None


def _parts(text: str) -> tuple[Path, str]:
    """The machine, and the snapshot. A machine's name has no colon; a path may have one."""
    path, colon, name = text.rpartition(":")
    which, name = (path, name) if colon and "/" not in name else (text, "")
    machine = machines.machine(which)
    if name and not (machine / "snap" / name).is_dir():
        raise Invalid(f"{machine} has no snapshot {name}")
    return machine, name


def _make(machine: Path, folder: Path) -> None:
    before = os.umask(0o022)  # with others in its mode a directory in snap/ is a snapshot that is taken
    try:
        folder.mkdir()
    except OSError as failure:
        raise archive.refused(machine, failure) from None
    finally:
        os.umask(before)
