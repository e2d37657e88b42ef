"""`vmfs screen MACHINE`: what its display shows, as text or as a picture."""

import argparse
import os
import sys
from pathlib import Path

from vmfs.commands import machines
from vmfs.words.errors import EngineFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("--png", metavar="FILE", help="write a picture there (-: to stdout)")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    if arguments.png is None:
        print(machines.read(machine, "screen.txt"), end="")
        return 0
    try:
        picture = (machine / "screen.png").read_bytes()
    except OSError as failure:
        raise machines.reason(machine, "screen.png", failure) from None
    if arguments.png == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(picture)
        return 0
    try:
        Path(arguments.png).write_bytes(picture)
    except OSError as failure:
        raise EngineFailed(f"{arguments.png}: {os.strerror(failure.errno or 5)}") from None
    return 0
