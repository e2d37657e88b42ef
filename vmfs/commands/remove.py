"""`vmfs rm MACHINE ...`: remove machines, with all that they have."""

import argparse
import os

from vmfs.commands import machines
from vmfs.words.errors import EngineFailed, NotPermitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machines", metavar="MACHINE", nargs="+", help=machines.HELP)


def run(arguments: argparse.Namespace) -> int:
    paths = [machines.machine(each) for each in arguments.machines]  # all are there, before one is removed
    for path in paths:
        try:
            os.rmdir(path)
        except PermissionError:
            raise NotPermitted(f"{path} is not yours to remove") from None
        except OSError as failure:
            raise EngineFailed(f"{path}: {failure.strerror}") from None
    return 0
