"""`vmfs set MACHINE NAME=VALUE ...`: set registers, all of them or none."""

import argparse
import re

from vmfs.commands import machines
from vmfs.words.errors import Invalid
from vmfs.words.registers import REGISTERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("values", metavar="NAME=VALUE", nargs="+", help="a register, as rip=0x7c00 or msr.0xc0000082=0")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    for each in arguments.values:
        if not re.fullmatch(r"[^\s=]+=[^\s=]+", each):
            raise Invalid(f"{each[:40]!r} is not NAME=VALUE")
    try:
        machines.write(machine, "registers", " ".join(arguments.values))
    except Invalid as failure:
        for name in (each.partition("=")[0] for each in arguments.values):
            if name not in REGISTERS and not name.startswith("msr."):
                raise Invalid(f"{failure}{machines.did_you_mean(name, REGISTERS)}") from None
        raise
    return 0
