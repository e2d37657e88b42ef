"""pages.py DIRECTORY: man pages and completions of vmfs, from its table of commands (vmfs.cli.COMMANDS)."""

import argparse
import sys
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from vmfs import __version__, cli

SHELLS = ("bash", "zsh", "fish")
MACHINES = {"machine", "machines", "directory", "mount", "uploads"}


def main() -> None:
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    parser = cli.whole_parser()
    for name, one in (("vmfs", parser), *subparsers(parser).items()):
        (where / f"{name}.1").write_text(page(one))
    for shell in SHELLS:
        (where / f"vmfs.{shell}").write_text(shtab.complete(completed(cli.whole_parser()), shell=shell))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """By the name of their page."""
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return {f"vmfs-{name}": one for name, one in commands.choices.items()}


def page(parser: argparse.ArgumentParser) -> str:
    parser.man_short_description = (parser.description or "").rstrip(".")
    data = {"project_name": "vmfs", "version": __version__, "prog": parser.prog.replace(" ", "-"), "format": "pretty"}
    return str(Manpage(parser, _data=data))


def completed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With what shells complete: directories where a machine or a mount is named, else files."""
    for one in subparsers(parser).values():
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                completed(one)
            if action.dest in MACHINES:
                action.complete = shtab.DIRECTORY
            elif action.metavar in ("FILE", "KERNEL"):
                action.complete = shtab.FILE
    return parser


if __name__ == "__main__":
    main()
