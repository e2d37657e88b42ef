"""`vmfs run MACHINE`: run it until its next exit, and print that."""

import argparse

from vmfs.commands import machines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("bound", metavar="BOUND", nargs="*", default=[],
                        help="as `vm_run` takes it: `until main`, `insns 1000`, `for 2s` (default: no bound)")


def run(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    if arguments.bound:
        machines.write(machine, "vm_run", " ".join(arguments.bound))
        print(machines.read(machine, "exit"), end="")
    else:
        print(machines.read(machine, "vm_run"), end="")
    return 0
