"""`vmfs trace MACHINE start|stop|print`: what it executes, as text."""

import argparse
import contextlib
import os
import sys

from vmfs.commands import machines
from vmfs.words.errors import Invalid

KINDS = ("insn", "mem", "exceptions", "interrupts", "exits")
_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("what", choices=("start", "stop", "print"),
                        help="start: from the next instruction on; stop; print: what was traced, and what comes")
    parser.add_argument("kinds", metavar="KIND", nargs="*",
                        help=f"start: {', '.join(KINDS)} (default: insn)")
    parser.add_argument("--range", metavar="FIRST-LAST", help="start: only what instructions there do")
    parser.add_argument("--drop", action="store_true", help="start: drop what nobody reads in time")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    for kind in arguments.kinds:
        if arguments.what != "start":
            raise Invalid(f"{arguments.what} takes no {kind[:20]!r}")
        if kind not in KINDS:
            raise Invalid(f"{kind[:20]!r} is none of {', '.join(KINDS)}{machines.did_you_mean(kind, KINDS)}")
    if arguments.what == "stop":
        machines.write(machine, "trace", "off")
    elif arguments.what == "start":
        lines = [f"{kind} {'on' if kind in (arguments.kinds or ['insn']) else 'off'}" for kind in KINDS]
        lines += [f"range {arguments.range or 'all'}", f"full {'drop' if arguments.drop else 'wait'}"]
        machines.write(machine, "trace", "\n".join(lines))
    else:
        _print(machine)
    return 0


def _print(machine) -> None:
    """Until tracing is switched off."""
    try:
        with open(machine / "trace", "rb", buffering=0) as file:
            while data := os.read(file.fileno(), _CHUNK):
                with contextlib.suppress(ValueError):
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as failure:
        raise machines.reason(machine, "trace", failure) from None
