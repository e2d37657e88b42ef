"""`vmfs load`: a machine of a file that `vmfs save` has written."""

import argparse
import os
from pathlib import Path

from vmfs.commands import archive, machines
from vmfs.host import mounts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="of `vmfs save`")
    parser.add_argument("machine", metavar="MACHINE", help="the directory that is made for it, as /vmfs/demo, "
                        "or its name in a mount of yours")


def run(arguments: argparse.Namespace) -> int:
    try:
        source = arguments.file.open("rb")
    except OSError as failure:
        raise archive.failed(arguments.file, failure) from None
    with source:
        archive.load(_target(arguments.machine), source, str(arguments.file), os.fstat(source.fileno()).st_size)
    return 0


def _target(text: str) -> Path:
    """A bare name is one in the mount that is the current directory, else in the first one of this user's."""
    if "/" in text or (here := mounts.at(".")) is not None and here.is_vmfs:
        return Path(text)
    return machines.mount(None) / text
