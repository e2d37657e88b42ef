"""`vmfs console`: a raw terminal on a machine's first serial port."""

import argparse
import errno
import os
import sys

from vmfs.commands import machines, terminal
from vmfs.commands.options import argument
from vmfs.words.errors import EngineFailed, Gone, Invalid, NotPermitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("--escape", type=argument(terminal.parse_escape), default=terminal.ESCAPE, metavar="KEY",
                        help="the key that leads out, as ^] (the default) or ^A")


def run(arguments: argparse.Namespace) -> int:
    machine = str(machines.machine(arguments.machine))
    console = open_console(machine)
    if os.isatty(0):
        print(f"{arguments.machine}: {terminal.escape_name(arguments.escape)} leads out", file=sys.stderr)
    try:
        escaped = terminal.attach(console, escape=arguments.escape)
    except OSError as failure:
        if failure.errno == errno.ENODEV:
            raise Gone(f"{arguments.machine} was removed") from None
        if failure.errno == errno.EOPNOTSUPP:
            raise _bare(machine) from None
        raise
    finally:
        os.close(console)
    if os.isatty(0):
        print(file=sys.stderr)
    return terminal.ESCAPED if escaped else 0


def open_console(machine: str) -> int:
    """Its descriptor, with a sentence for each thing that may be wrong."""
    try:
        return os.open(os.path.join(machine, "console"), os.O_RDWR)
    except FileNotFoundError:
        raise Invalid(f"{machine} is no machine: there is no {machine}/console") from None
    except PermissionError:
        raise NotPermitted(f"{machine}/console is not yours to open") from None
    except OSError as failure:
        if failure.errno == errno.EOPNOTSUPP:
            raise _bare(machine) from None
        raise EngineFailed(f"{machine}/console: {os.strerror(failure.errno or errno.EIO)}") from None


def _bare(machine: str) -> Invalid:
    return Invalid(f"{machine} has no console: it is a bare machine (echo pc > {machine}/machine)")
