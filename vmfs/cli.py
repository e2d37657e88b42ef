"""The `vmfs` command: COMMANDS, a row each, and the few rules that they share.

A failure is one sentence on stderr and exit code 1, a mistake in the arguments 2. mount(8) and mount.fuse3
call the command as `vmfs SOURCE DIR -o OPTIONS`, which is `vmfs mount DIR -o OPTIONS`.
"""

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Container, Sequence
from typing import NoReturn

from vmfs import __version__
from vmfs.words.errors import VmfsError

FAILURE = 1
USAGE = 2


@dataclasses.dataclass(frozen=True)
class Command:
    name: str
    summary: str
    module: str
    """The module with its `add_arguments(parser)` and `run(arguments) -> exit code`. It is imported when the
    command is called: `vmfs version` need not load what `vmfs mount` does."""


COMMANDS = (
    Command("mount", "make a directory a place for virtual machines", "vmfs.commands.mount"),
    Command("umount", "unmount it, which ends its machines", "vmfs.commands.umount"),
    Command("doctor", "what this host offers, what is missing and how to get it", "vmfs.commands.doctor"),
    Command("boot", "boot a kernel in a machine of its own, on this terminal", "vmfs.commands.boot"),
    Command("console", "join a machine's serial port to this terminal", "vmfs.commands.console"),
    Command("ls", "list the machines of a mount", "vmfs.commands.list"),
    Command("top", "show what the machines of a mount do, live", "vmfs.commands.top"),
    Command("rm", "remove machines", "vmfs.commands.remove"),
    Command("set", "set registers of a machine", "vmfs.commands.set"),
    Command("run", "run a machine until its next exit, and print that", "vmfs.commands.run"),
    Command("step", "execute single instructions of a machine", "vmfs.commands.step"),
    Command("disasm", "print a machine's next instructions", "vmfs.commands.disasm"),
    Command("why", "tell why a machine has shut down", "vmfs.commands.why"),
    Command("screen", "print what a machine's display shows", "vmfs.commands.screen"),
    Command("trace", "trace what a machine executes", "vmfs.commands.trace"),
    Command("gdb", "join a gdb to a machine: `target remote | vmfs gdb MACHINE`", "vmfs.commands.gdb"),
    Command("save", "write a machine, or a snapshot of it, to one file", "vmfs.commands.save"),
    Command("load", "make a machine of such a file", "vmfs.commands.load"),
    Command("disk", "make, look at, copy out and keep disks of machines", "vmfs.commands.disk"),
    Command("web", "show the machines of a mount as a web page", "vmfs.web.command"),
    Command("fleet", "run cases on the workers of a Dask cluster", "vmfs.fleet.command"),
    Command("help", "tell of a command, or of a file of a machine", "vmfs.commands.help"),
    Command("version", "print the version", "vmfs.commands.version"),
)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """Arguments that it has no use for."""
        option = next((one.partition("=")[0] for one in extra if one.startswith("-")), None)
        if option is None:
            self.error(f"{extra[0][:40]!r} is one argument too many")
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"there is no option {option[:40]!r}" + (f": did you mean {near[0]}?" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (without the program's name) asks for; the exit code."""
    open_standard_streams()
    argv = from_mount_helper(list(sys.argv[1:] if argv is None else argv))
    named = argv[0] if argv else ""
    known = [command.name for command in COMMANDS]
    parser = make_parser(known if named == "help" else [named])
    if named and named not in known and not named.startswith("-"):
        near = difflib.get_close_matches(named, known, n=1)
        parser.error(f"there is no command {named[:40]!r}" + (f": did you mean {near[0]}?" if near else ""))
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        getattr(arguments, "own", parser).refuse(extra)
    try:
        return arguments.run(arguments)
    except VmfsError as failure:
        print(f"vmfs {arguments.command}: {failure}", file=sys.stderr)
        return FAILURE
    except BrokenPipeError:     # `vmfs doctor | head -1`
        sys.stderr.close()
        return FAILURE
    except KeyboardInterrupt:
        return 130      # 128 + SIGINT, as the shell has it


def make_parser(whole: Container[str]) -> Parser:
    """The parser, with the arguments of the commands in `whole`: their modules are imported."""
    parser = Parser("vmfs", description="Every virtual machine is a directory.")
    parser.add_argument("--version", action="version", version=f"vmfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Parser)
    for command in COMMANDS:
        description = f"{command.summary}.".capitalize()
        sub = commands.add_parser(command.name, help=command.summary, description=description)
        if command.name in whole:
            module = importlib.import_module(command.module)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, parser=parser, own=sub)
    return parser


def whole_parser() -> Parser:
    """With the arguments of all commands: man pages and completions are made of it (scripts/pages.py)."""
    return make_parser([command.name for command in COMMANDS])


def open_standard_streams() -> None:
    """/dev/null where the caller has closed 0, 1 or 2: else the next file that is opened is one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, closefd=False))


def from_mount_helper(argv: list[str]) -> list[str]:
    """`argv` as `vmfs mount` takes it, if it is as mount.fuse3(8) calls a file system: SOURCE DIR -o OPTIONS.

    `mount -t fuse.vmfs SOURCE DIR` and `mount -t fuse vmfs#SOURCE DIR` both end there. The source names
    nothing here; if there is one, the mount table shows it.
    """
    if len(argv) != 4 or argv[2] != "-o" or argv[0].startswith("-"):
        return argv
    if argv[0] in (each.name for each in COMMANDS):
        return argv
    source, directory, _, options = argv
    if source and source != "none" and "," not in source:
        options += f",fsname={source}"
    return ["mount", "-o", options, "--", directory]


if __name__ == "__main__":
    sys.exit(main())
