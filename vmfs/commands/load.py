"""`vmfs load`: a machine of a file that `vmfs save` has written."""

import argparse
import os
from pathlib import Path

from vmfs.commands import archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="of `vmfs save`")
    parser.add_argument("machine", metavar="MACHINE", type=Path, help="the directory that is made for it")


def run(arguments: argparse.Namespace) -> int:
    try:
        source = arguments.file.open("rb")
    except OSError as failure:
        raise archive.failed(arguments.file, failure) from None
    with source:
        archive.load(arguments.machine, source, str(arguments.file), os.fstat(source.fileno()).st_size)
    return 0
