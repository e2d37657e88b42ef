"""`vmfs disk`: make an image, look at one, copy a machine's disk out, keep what was written to a `cow` disk."""

from __future__ import annotations

import argparse
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmfs.boot import Source, media
from vmfs.commands import archive, machines
from vmfs.commands.options import argument, size
from vmfs.words.errors import Busy, Invalid, Unsupported
from vmfs.words.images import COMPRESSED, FORMATS

_STEP = 1 << 20
_BLOCK = 64 << 10  # of zeros: a hole
_ZEROS = bytes(_STEP)
_SECTOR = 512
_STANDS = "it runs: `vmfs disk` copies disks of machines that stand (`echo pause > {}/state`, or shut the guest down)"


def _unpack() -> Any:
    """What reads images of other formats. Unsupported where only the client is installed."""
    try:
        from vmfs.host import unpack
    except ModuleNotFoundError as missing:
        raise Unsupported(f"images need {missing.name}, which a client does not: pip install 'vmfs[mount]'") from None
    return unpack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action", parser_class=type(parser))
    create = actions.add_parser("create", help="make a raw image", description="Make a raw image, which is sparse.")
    create.add_argument("file", metavar="FILE", help="which is not there yet")
    create.add_argument("size", metavar="SIZE", type=argument(size), nargs="?",
                        help="as 8G; with --from: larger than that")
    create.add_argument("--from", metavar="FILE", dest="source",
                        help="what is in it: an image, also qcow2, VMDK, VHDX or VDI, or one that is compressed")
    create.add_argument("--format", choices=FORMATS, default="", help="of that (default: what its first bytes say)")
    info = actions.add_parser("info", help="what an image is, or which disks a machine has",
                              description="Print what an image is, or which disks a machine has.")
    info.add_argument("file", metavar="FILE|MACHINE")
    export = actions.add_parser("export", help="copy a disk as its guest has it into a raw image",
                                description="Copy a disk, as its guest has it, into a raw image.")
    machines.add_machine(export)
    export.add_argument("disk", metavar="DISK", help="a name in its dev/, as blk0")
    export.add_argument("file", metavar="FILE", help="which is not there yet")
    commit = actions.add_parser("commit", help="keep what was written to a cow disk: in its image",
                                description="Put a disk as its guest has it in the place of the image below it.")
    machines.add_machine(commit)
    commit.add_argument("disk", metavar="DISK", help="a name in its dev/, as blk0")


def run(arguments: argparse.Namespace) -> int:
    try:
        return ACTIONS[arguments.action](arguments)
    except OSError as failure:
        raise archive.failed(failure.filename or arguments.file, failure) from None


# ---- images


def _create(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file).absolute()
    if arguments.source is None and arguments.size is None:
        raise Invalid("it takes a SIZE, or --from FILE")
    if arguments.size is not None and (not arguments.size or arguments.size % _SECTOR):
        raise Invalid(f"a disk has a multiple of {_SECTOR} bytes, not {arguments.size}")
    with _new(path) as file:
        length = 0
        if arguments.source is not None:
            length = _take(arguments.source, arguments.format, path.parent, file.fileno())
        whole = arguments.size if arguments.size is not None else -(-length // _SECTOR) * _SECTOR
        if whole < length:
            raise Invalid(f"{arguments.source}: its disk has {length} bytes, which are more than {whole}")
        os.ftruncate(file.fileno(), whole)
    return 0


def _take(source: str, asked: str, folder: Path, target: int) -> int:
    """The contents of an image. Returns its size."""
    with open(source, "rb"):  # in this process: so that the sentence is open's
        pass
    fd, length = _unpack().unpacked(os.path.abspath(source), asked, lambda: _unnamed(folder))
    try:
        _copy(fd, target, length, source)
    finally:
        os.close(fd)
    return length


def _unnamed(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def _new(path: Path) -> Any:
    if os.path.lexists(path):
        raise Invalid(f"{path} is there already")
    return archive.new_file(path, replaces=False)


def _copy(source: int, target: int, length: int, what: str) -> None:
    """Of a file what is not zeros."""
    progress = archive.Progress(what, length)
    for start, count in archive.extents(source, length):
        for at, data in _pieces(source, start, min(start + count, length), what):
            progress.more(len(data))
            for part in range(0, len(data), _BLOCK):
                block = data[part : part + _BLOCK]
                if block != _ZEROS[: len(block)]:
                    _write(target, block, at + part)
    progress.end()


def _pieces(fd: int, at: int, end: int, what: str) -> Iterator[tuple[int, bytes]]:
    while at < end:
        data = os.pread(fd, min(_STEP, end - at), at)
        if not data:
            raise Invalid(f"{what} became shorter")
        yield at, data
        at += len(data)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


# ---- machines


def _info(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    if path.is_dir() or not path.exists() and "/" not in arguments.file:
        for name, said in _disks(machines.machine(arguments.file)).items():
            print(f"{name} {said.get('mode', 'ro')} {said['bytes']} {said.get('path') or said.get('medium', 'none')}")
        return 0
    said = _unpack().looked_at(str(path.absolute()))
    there = os.stat(path)
    taken = there.st_blocks * _SECTOR
    lines = {**said, "taken": str(taken) if stat.S_ISREG(there.st_mode) else "", "contents": _contents(path, said)}
    print("".join(f"{name} {value}\n" for name, value in lines.items() if value), end="")
    return 0


def _contents(path: Path, said: dict[str, str]) -> str:
    """What `vmfs boot` takes it for."""
    if said["format"] != "raw":
        return "" if said["format"] in COMPRESSED else media.DISK
    with open(path, "rb") as image:
        source = Source(image.fileno(), int(said["size"]), str(path))
        try:
            kind = media.tell(source)
        except Invalid:
            return "not told"
        return f"{kind}, by UEFI only" if media.needs_uefi(source) else kind


def _disks(machine: Path) -> dict[str, dict[str, str]]:
    """Of each disk that a machine has, by its name, what its `info` says, and its size."""
    found = {}
    for name in sorted(os.listdir(machine / "dev")):
        image = machine / "dev" / name / "image"
        if image.exists():
            lines = machines.read(machine, f"dev/{name}/info").splitlines()
            said = dict(line.split(" ", 1) for line in lines if " " in line)
            found[name] = {**said, "bytes": str(image.stat().st_size)}
    return found


def _disk(machine: Path, name: str) -> dict[str, str]:
    disks = _disks(machine)
    if name not in disks:
        raise Invalid(f"{machine} has no disk {name[:40]!r}; it has {', '.join(disks) or 'none'}"
                      + machines.did_you_mean(name, disks))  # fmt: skip
    return disks[name]


def _export(arguments: argparse.Namespace) -> int:
    machine = machines.machine(arguments.machine)
    _disk(machine, arguments.disk)
    with _new(Path(arguments.file).absolute()) as file:
        _copy_out(machine, arguments.disk, file.fileno())
    return 0


def _copy_out(machine: Path, name: str, target: int) -> None:
    """The disk of a machine that stands, from the beginning to the end of it."""
    folder = machine / "dev" / name
    before = _stands(machine), machines.read(folder, "counters")
    source = os.open(folder / "image", os.O_RDONLY)
    try:
        length = os.fstat(source).st_size
        if not length:
            raise Invalid(f"{machine}: nothing is in {name}")
        _copy(source, target, length, name)
        os.ftruncate(target, length)
    finally:
        os.close(source)
    if before != (_stands(machine), machines.read(folder, "counters")):
        raise Busy(f"{machine} ran meanwhile: what was copied of {name} is not of one moment")


def _stands(machine: Path) -> str:
    state = machines.read(machine, "state").strip()
    if state == "running":
        raise Busy(f"{machine}: {_STANDS.format(machine)}")
    return machines.read(machine, "exit")


def _commit(arguments: argparse.Namespace) -> int:
    """The image's place is taken by a new file: machines that have the old one below them, such as forks, keep that."""
    machine = machines.machine(arguments.machine)
    said = _disk(machine, arguments.disk)
    arguments.file = said.get("path", "")
    if said.get("mode") != "cow":
        raise Invalid(f"{machine}: {arguments.disk} is no cow disk: there is nothing to commit")
    path = Path(os.path.realpath(arguments.file))
    with open(path, "r+b") as image:
        if not stat.S_ISREG(os.fstat(image.fileno()).st_mode):
            raise Invalid(f"{path} is no file that another one can take the place of: `vmfs disk export` copies it out")
        if (found := _unpack().looked_at(str(path))["format"]) != "raw" and int(said["bytes"]) != os.stat(path).st_size:
            raise Invalid(f"{path}: it is {found}, which is not written: `vmfs disk export` makes a raw image")
        try:
            fcntl.flock(image.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{path}: another machine, or somebody else, writes to it (flock)") from None
        there = os.fstat(image.fileno())
        with archive.new_file(path) as file:
            _copy_out(machine, arguments.disk, file.fileno())
            os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
            if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), there.st_uid, there.st_gid)
    return 0


ACTIONS = {"create": _create, "info": _info, "export": _export, "commit": _commit}
