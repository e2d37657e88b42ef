"""`vmfs load`: a machine of a file that `vmfs save` has written."""

import argparse
import contextlib
import os
from pathlib import Path

from vmfs.commands import archive
from vmfs.words.errors import Invalid

SNAPSHOT = "loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="of `vmfs save`")
    parser.add_argument("machine", metavar="MACHINE", type=Path, help="the directory that is made for it")


def run(arguments: argparse.Namespace) -> int:
    machine: Path = arguments.machine
    try:
        source = arguments.file.open("rb")
    except OSError as failure:
        raise archive.failed(arguments.file, failure) from None
    with source:
        try:
            machine.mkdir()
        except OSError as failure:
            raise archive.failed(machine, failure) from None
        try:
            if not (machine / "vm_run").exists():
                raise Invalid(f"{machine} is in no mount of vmfs")
            _load(machine, source, str(arguments.file), os.fstat(source.fileno()).st_size)
        except BaseException:
            with contextlib.suppress(OSError):
                machine.rmdir()
            raise
    return 0


def _load(machine: Path, source, what: str, size: int) -> None:
    folder = machine / "snap" / SNAPSHOT
    try:
        before = os.umask(0)  # which says that 0700 is meant
        try:
            folder.mkdir(0o700)
        finally:
            os.umask(before)
        archive.read(source, folder, what, size)
        (machine / "restore").write_text(f"{SNAPSHOT}\n")
        folder.rmdir()
    except OSError as failure:
        raise archive.refused(machine, failure) from None
