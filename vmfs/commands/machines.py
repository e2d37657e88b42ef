"""For the commands about machines: which one is meant, and its files with the sentence that says why not."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vmfs.host import mounts
from vmfs.words.errors import EngineFailed, Gone, Invalid, NotPermitted

NO_MOUNT = "there is no vmfs mount of yours: vmfs mount DIR makes one, or name another user's"
HELP = "a directory, as /vmfs/demo, or a name in a mount of yours"


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", metavar="MACHINE", help=HELP)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about a word that is none of `names`: nothing, where none is like it."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f": did you mean {near[0]}?" if near else ""


def own_mounts() -> Iterator[Path]:
    """The mounts that this user has made, the first one first; or the one that VMFS_MOUNT names. Another user's is used
    only if it is named."""
    named = os.environ.get("VMFS_MOUNT")
    if named:
        yield mount(named)
        return
    for each in mounts.table():
        if each.is_vmfs and each.user == os.geteuid() and not mounts.is_dead(each.path):
            yield Path(each.path)


def mount(given: str | None) -> Path:
    """The mount that is given, or the first one of this user's."""
    if given is not None:
        mounted = mounts.at(given)
        if mounted is None or not mounted.is_vmfs:
            raise Invalid(f"{given} is not a vmfs mount")
        return Path(given)
    for path in own_mounts():
        return path
    raise Invalid(NO_MOUNT)


def names_in(directory: Path) -> list[str]:
    """The machines of a mount."""
    try:
        return sorted(each.name for each in os.scandir(directory) if each.is_dir(follow_symlinks=False))
    except OSError as failure:
        raise EngineFailed(f"{directory}: {failure.strerror}") from None


def machine(text: str) -> Path:
    """The directory of the machine that `text` is: a path, or a name in a mount of this user's."""
    path = Path(text)
    if is_machine(path):
        return path
    if "/" in text:
        names = names_in(path.parent) if path.parent.is_dir() else []
        raise Invalid(f"{text} is no machine: there is no {text}/vm_run{did_you_mean(path.name, names)}")
    known: list[str] = []
    for directory in own_mounts():
        if is_machine(directory / text):
            return directory / text
        known += names_in(directory)
    raise Invalid(f"there is no machine {text[:64]!r} in a mount of yours{did_you_mean(text, known)}")


def is_machine(path: Path) -> bool:
    try:
        os.lstat(path / "vm_run")
    except PermissionError:
        raise NotPermitted(f"{path} is not yours to look at") from None
    except OSError:
        return False
    return True


def read(path: Path, name: str) -> str:
    """A text file of a machine's."""
    try:
        return (path / name).read_text(errors="replace")
    except OSError as failure:
        raise reason(path, name, failure) from None


def write(path: Path, name: str, text: str) -> None:
    try:
        with open(path / name, "w") as file:
            file.write(text + "\n")
    except OSError as failure:
        raise reason(path, name, failure) from None


def reason(path: Path, name: str, failure: OSError) -> Exception:
    """What failed, in the machine's own words where it has some."""
    if failure.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(f"{path / name} is not yours to use")
    if failure.errno == errno.ENODEV:
        return Gone(f"{path} was removed")
    if failure.errno == errno.EINTR:
        return KeyboardInterrupt()
    try:
        said = (path / "error").read_text().strip()
    except OSError:
        said = ""
    return Invalid(f"{path.name}: {said or f'{name}: {failure.strerror}'}")
