"""Sessions in Markdown, as people copy them: what a page's blocks say is done, and what they show is what comes.

    ```console      commands after `$ `, and what they print, in one shell for the page
    ```c NAME       a file of that name, in any language
    ```python       a program that is run; it prints nothing, or what stands after `print(...)  # `

In what is printed, `...` stands for anything: alone for any lines, else for a part of its line. Other blocks (text, and
those without a word or, of C, a name) are only read.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 150
_FENCE = re.compile(r"^```(\w*) ?(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_PRINTED = re.compile(r"^\s*print\(.*\)\s+# (.*)$", re.MULTILINE)
_MARK = "=====next command====="
READ_ONLY = {"", "c", "text"}


@dataclass
class Command:
    text: str
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    language: str
    name: str
    body: str

    def commands(self) -> list[Command]:
        """Those of a console's, each with what it shows."""
        found: list[Command] = []
        for line in self.body.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            elif line.startswith("> ") and not found[-1].shown:
                found[-1].text += "\n" + line[2:]
            else:
                found[-1].shown.append(line)
        return found


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in _FENCE.findall(text)]


def commands(text: str, folder: Path) -> list[Command]:
    """All that a page does. Its files and programs are kept in `folder` until the page comes to them."""
    found: list[Command] = []
    for number, block in enumerate(blocks(text)):
        if block.language == "console":
            found += block.commands()
        elif block.name or block.language == "python":
            kept = folder / f"block-{number}"
            kept.write_text(block.body)
            if block.name:
                found.append(Command(f"cp '{kept}' {block.name}"))
            else:
                found.append(Command(f"python3 '{kept}'", _PRINTED.findall(block.body)))
        else:
            assert block.language in READ_ONLY, f"nothing is known of a block of {block.language!r}"
    return found


def matches(shown: list[str], printed: list[str]) -> bool:
    parts = []
    for line in shown:
        if line == "...":
            parts.append(r"(?:.*\n)*")
        else:
            parts.append(".*".join(map(re.escape, line.split("..."))) + r"[ \t]*\n")
    return re.fullmatch("".join(parts), "".join(f"{line.rstrip()}\n" for line in printed)) is not None


def run(
    page: Path,
    home: Path,
    meant: Mapping[str, str] | None = None,
    *,
    start: Path | None = None,
    path: str = f"{Path(sys.executable).parent}:{os.environ['PATH']}",
) -> None:
    """AssertionError with the command whose output is another one. `meant`: what some words of the page mean here.
    `start`: where the shell begins, in the place of its home."""
    folder = home.parent / f"{home.name}-blocks"
    folder.mkdir()
    text = page.read_text()
    for said, here in (meant or {}).items():
        text = text.replace(said, here)
    session = commands(text, folder)
    script = "".join(f"{one.text}\necho '{_MARK}'\n" for one in session)
    environment = {
        **os.environ,
        "HOME": str(home),
        "VMFS_MOUNT": str(home / "vms"),  # the first of this user's is another test's
        "PATH": path,
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    shell = subprocess.Popen(
        ["bash", "--noprofile", "--norc", "-c", script], cwd=start or home, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    alarm = threading.Timer(SECONDS, os.killpg, (shell.pid, signal.SIGKILL))
    alarm.start()
    try:
        with shell:
            said = shell.stdout.read().decode(errors="replace")
    finally:
        alarm.cancel()
    printed = [part.splitlines() for part in said.split(f"{_MARK}\n")]
    for one, lines in zip(session, printed[:-1], strict=False):
        if not matches(one.shown, lines):
            raise AssertionError("\n".join([f"{page.name}: $ {one.text}", "shown:", *one.shown, "printed:", *lines]))
    if len(printed) <= len(session):
        unfinished = session[len(printed) - 1]
        raise AssertionError(f"{page.name}: $ {unfinished.text}\ndid not come to its end: {printed[-1]}")
