"""`vmfs disasm MACHINE [ADDR [N]]`: the next instructions, or those at an address."""

import argparse

from vmfs.commands import machines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("where", metavar="ADDR", nargs="?", help="an address, a symbol or FILE:LINE, or rip")
    parser.add_argument("count", metavar="N", nargs="?", default="", help="how many instructions (default: 16)")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    if arguments.where is not None:
        machines.write(machine, "disasm", f"{arguments.where} {arguments.count}".strip())
    print(machines.read(machine, "disasm"), end="")
    return 0
