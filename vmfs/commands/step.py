"""`vmfs step MACHINE [N]`: execute instructions, and print where it stands."""

import argparse

from vmfs.commands import machines
from vmfs.commands.options import argument, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("count", metavar="N", nargs="?", type=argument(count), default=1, help="how many (default: 1)")
    parser.add_argument("--cpu", metavar="K", type=argument(count), help="of that CPU (default: the last exit's)")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    cpu = "" if arguments.cpu is None else f" cpu={arguments.cpu}"
    machines.write(machine, "vm_run", f"step {arguments.count}{cpu}")
    print(machines.read(machine, "exit"), end="")
    if not arguments.cpu:
        print("".join(machines.read(machine, "disasm").splitlines(keepends=True)[:1]), end="")
    return 0
