"""What `-o` takes: OPTIONS, a row each, read into MountSettings."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vmfs.host.settings import MountSettings
from vmfs.words.errors import Invalid, VmfsError
from vmfs.words.numbers import parse_number, parse_size


def engine(text: str) -> str:
    """The name of an engine, or `auto`."""
    from vmfs.engine import ENGINES
    names = ["auto", *(each.name for each in ENGINES)]
    if text not in names:
        raise Invalid(f"{text[:40]!r} is none of {', '.join(names)}")
    return text


def count(text: str) -> int:
    """A number of VMs."""
    if text.startswith("-"):
        raise Invalid(f"{text[:40]!r} is less than nothing")
    return parse_number(text, bits=31)


def size(text: str) -> int:
    """A number of bytes, as 512M or 2G."""
    try:
        value = parse_size(text)
    except Invalid:
        raise Invalid(f"{text[:40]!r} is not a size: a number of bytes, or one with K, M, G or T") from None
    if not 0 <= value < 1 << 63:
        raise Invalid(f"{text} is more than a file can have")
    return value


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of `-o`: to vmfs (`field`, `parse`), to FUSE (`fuse`), or to nobody (neither)."""

    name: str
    field: str = ""
    parse: Callable[[str], Any] | None = None
    """From the text after the `=`; an option without one takes no value."""
    fuse: bool = False
    value: bool = False
    """Whether a FUSE option has a value."""


OPTIONS = (
    # vmfs's own, by the names of the long options of `vmfs mount`.
    Option("engine", field="engine", parse=engine),
    Option("allow_other", field="allow_other"),
    Option("max_vms", field="max_vms", parse=count),
    Option("max_mem", field="max_memory", parse=size),
    Option("max_vms_user", field="max_vms_user", parse=count),
    Option("max_mem_user", field="max_memory_user", parse=size),
    Option("max_waiting_user", field="max_waiting_user", parse=count),
    Option("debug", field="debug"),
    # mount(8) and fuse(4): handed on.
    Option("ro", fuse=True),
    Option("nosuid", fuse=True),
    Option("nodev", fuse=True),
    Option("noexec", fuse=True),
    Option("noatime", fuse=True),
    Option("nodiratime", fuse=True),
    Option("sync", fuse=True),
    Option("dirsync", fuse=True),
    Option("allow_root", fuse=True),
    Option("fsname", fuse=True, value=True),
    Option("max_read", fuse=True, value=True),
    Option("context", fuse=True, value=True),       # SELinux
    Option("fscontext", fuse=True, value=True),
    Option("defcontext", fuse=True, value=True),
    Option("rootcontext", fuse=True, value=True),
    # What holds anyway. mount(8) adds rw, suid and dev whether asked or not; a mount has no devices and no
    # programs to honour them for, so that FUSE's own nosuid and nodev stay.
    Option("rw"), Option("suid"), Option("dev"), Option("exec"), Option("async"), Option("atime"),
    Option("diratime"), Option("relatime"), Option("defaults"), Option("default_permissions"),
    Option("auto_unmount"), Option("nonempty"),
    # Of /etc/fstab, for mount(8) and systemd.
    Option("auto"), Option("noauto"), Option("user"), Option("users"), Option("nouser"), Option("nofail"),
    Option("_netdev"),
)
_BY_NAME = {each.name: each for each in OPTIONS}


def parse_options(lists: Iterable[str]) -> MountSettings:
    """The settings that `lists` (each as "ro,engine=kvm,max_mem=2G") ask for; the last word on a thing wins.

    Raises Invalid for an option that is unknown or that does not parse.
    """
    changes: dict[str, Any] = {}
    fuse = []
    for text in (each for whole in lists for each in whole.split(",") if each):
        name, equals, value = text.partition("=")
        option = _BY_NAME.get(name)
        if option is None:
            if name.startswith(("x-", "X-", "comment")):    # fstab(5): for other programs
                continue
            raise Invalid(f"option {name[:40]!r} is unknown")
        if bool(equals) != (option.value or option.parse is not None):
            raise Invalid(f"option {name!r} {'takes no value' if equals else 'needs a value'}")
        if option.fuse:
            fuse.append(text)
        elif option.parse:
            try:
                changes[option.field] = option.parse(value)
            except Invalid as failure:
                raise Invalid(f"option {name!r}: {failure}") from None
        elif option.field:
            changes[option.field] = True
    return MountSettings(fuse_options=tuple(fuse), **changes)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as argparse wants it: what it raises is argparse's own, with our sentence."""
    import argparse

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except VmfsError as failure:
            raise argparse.ArgumentTypeError(str(failure)) from None
    return checked
