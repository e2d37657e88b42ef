"""`vmfs help [TOPIC]`: a command, or a file of a machine, as the reference has it."""

import argparse
import re
from importlib import resources

from vmfs.commands import machines
from vmfs.words.errors import Invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", metavar="TOPIC", nargs="?", help="a command, or a file, as `vm_run` or `debug`")


def run(arguments: argparse.Namespace) -> int:
    topic, parser = arguments.topic, arguments.parser
    (commands,) = (each.choices for each in parser._actions if each.dest == "command")
    if topic is None:
        parser.print_help()
        print("\nvmfs help COMMAND tells more of one, vmfs help FILE of a file of a machine.")
    elif topic in commands:
        commands[topic].print_help()
    else:
        sections = reference()
        if topic not in sections:
            near = machines.did_you_mean(topic, [*sections, *commands])
            raise Invalid(f"there is no command and no file {topic[:40]!r}{near}")
        print(sections[topic], end="")
    return 0


def reference() -> dict[str, str]:
    """The sections of docs/files.md, by the file that they are of."""
    found = {}
    text = (resources.files("vmfs") / "files.md").read_text()
    for part in re.split(r"^(?=##+ )", text, flags=re.MULTILINE):
        if match := re.match(r"### `([^`]+)`", part):
            found.setdefault(match[1], part)
    return found
