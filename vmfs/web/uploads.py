"""Files that are dropped on the page, and the machines that are made of them.

A file comes in a stream into a directory of this process's user, and has a name that is made here. A kernel goes into
the machine and is removed; what stays in a drive stays in the directory until this server ends.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmfs.client import Vm
from vmfs.commands import boot
from vmfs.web.panes import number_of
from vmfs.web.place import Place, checked, poke, told
from vmfs.web.threads import Threads
from vmfs.words.errors import Invalid
from vmfs.words.numbers import parse_number, parse_size

AT_ONCE = 4
_UNUSED = 600.0  # seconds that a file waits for its machine
_LEFT = 256 << 20  # bytes of the disk that an upload leaves free
_MODES = ("real", "protected", "long")


@dataclass
class Upload:
    path: Path
    name: str
    came: float
    size: int = 0
    used: bool = False


class Uploads:
    """`most`: bytes of all files together."""

    def __init__(self, directory: Path, most: int) -> None:
        self.directory, self.most = directory, most
        self._files: dict[str, Upload] = {}
        self._lock = threading.Lock()
        self._coming = 0

    async def take(self, name: str, length: int | None, chunks: AsyncIterator[bytes], threads: Threads) -> str:
        """A whole file; what it is called from now on. OSError where it does not fit, and nothing is left of it."""
        if self._coming >= AT_ONCE:
            raise OSError(errno.EBUSY, f"{AT_ONCE} files come in already")
        self._forget_unused()
        self._room(length or 0)
        key = secrets.token_hex(8)
        clean = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-60:] or "file"
        one = Upload(self.directory / f"{key}-{clean}", clean, time.monotonic())
        with self._lock:
            self._files[key] = one
        self._coming += 1
        try:
            fd = await threads.call("uploads", os.open, one.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                async for chunk in chunks:
                    self._room(len(chunk))
                    await threads.call("uploads", _write, fd, chunk)
                    one.size += len(chunk)
            finally:
                os.close(fd)
            if length is not None and one.size != length:
                raise OSError(errno.EIO, "the file has not come whole")
        except BaseException:
            self._drop(key)
            raise
        finally:
            self._coming -= 1
        return key

    def _room(self, more: int) -> None:
        with self._lock:
            taken = sum(each.size for each in self._files.values())
        if taken + more > self.most:
            raise OSError(errno.EFBIG, f"files may have {self.most >> 20} MiB together here (--max-upload)")
        if more > shutil.disk_usage(self.directory).free - _LEFT:
            raise OSError(errno.ENOSPC, f"there is no room for it in {self.directory}")

    def file(self, key: Any) -> Upload:
        with self._lock:
            one = self._files.get(key) if isinstance(key, str) else None
        if one is None:
            raise OSError(errno.ENOENT, "that file is not here any more: drop it again")
        return one

    def _drop(self, key: str) -> None:
        with self._lock:
            one = self._files.pop(key, None)
        if one is not None:
            with contextlib.suppress(OSError):
                one.path.unlink()

    def _forget_unused(self) -> None:
        old = time.monotonic() - _UNUSED
        with self._lock:
            keys = [key for key, each in self._files.items() if not each.used and each.came < old]
        for key in keys:
            self._drop(key)

    # ---- machines, in a thread

    def make(self, place: Place, said: dict[str, Any]) -> None:
        """A machine of what the page has said: `name`, and of what it shall be. What fails leaves none."""
        path = place.path / checked(said.get("name"))
        cpus = number_of(said.get("cpus") or 1, 1, 64, "the count of CPUs")
        arguments, plan = None, boot.Plan()
        if said.get("kind", "pc") == "pc":
            arguments = self._arguments(said)
            if arguments.file:
                plan = boot.plan_of(arguments)
        try:
            os.mkdir(path)
        except OSError as failure:
            raise told(place.path, failure) from None
        try:
            with Vm(path) as vm:
                if cpus > 1:
                    vm.cpus = cpus
                if arguments is None:
                    self._make_bare(vm, said)
                else:
                    boot.prepare(path, arguments, plan)
                    if said.get("start") and arguments.file:
                        vm.start()
        except BaseException:
            with contextlib.suppress(OSError):
                os.rmdir(path)
            raise
        self._settle(said, plan)

    def _arguments(self, said: dict[str, Any]) -> argparse.Namespace:
        """As of `vmfs boot`."""
        files = {name: str(self.file(said[name]).path) if said.get(name) else None for name in ("file", "initrd")}
        cmdline = said.get("cmdline") or None
        if cmdline is not None and (not isinstance(cmdline, str) or len(cmdline) > 4096 or "\n" in cmdline):
            raise Invalid("a command line is one line of text")
        mode = said.get("mode") or ""
        if files["file"] and mode in ("ro", "rw", "cow"):
            files["file"] += f":{mode}"
        parser = argparse.ArgumentParser()
        boot.add_arguments(parser)
        arguments = parser.parse_args([])
        arguments.__dict__.update(files, cmdline=cmdline, mem=_memory(said, "512M"), engine=_engine(said))
        if "uefi" in arguments:
            arguments.uefi = bool(said.get("uefi"))
        return arguments

    def _make_bare(self, vm: Vm, said: dict[str, Any]) -> None:
        """A CPU in a mode, with a flat binary at an address, if there is a file."""
        if (engine := _engine(said)) is not None:
            vm.engine = engine
        vm.mem_size = _memory(said, "64M")
        mode = said.get("mode") or "long"
        if mode not in _MODES:
            raise Invalid(f"a mode is one of {', '.join(_MODES)}")
        vm.mode = mode
        if said.get("file"):
            at = parse_number(str(said.get("at") or "0x1000"), what="the address")
            one = self.file(said["file"])
            if one.size > vm.mem_size:
                raise Invalid(f"{one.name} is larger than RAM")
            with open(one.path, "rb") as file:
                while data := file.read(1 << 20):
                    poke(vm.path, "mem", at + file.tell() - len(data), data)
            vm.write("registers", f"rip={at:#x}\n")

    def _settle(self, said: dict[str, Any], plan: boot.Plan) -> None:
        """What is in a drive stays; what is in the machine goes."""
        attached = " ".join(line for line, _ in plan.lines)
        for key in (said.get("file"), said.get("initrd")):
            if key and (one := self._files.get(key)) is not None:
                if one.path.name in attached:
                    one.used = True
                else:
                    self._drop(key)

    def load_symbols(self, vm: Vm, key: Any) -> None:
        one = self.file(key)
        try:
            vm.load_symbols(one.path)
        finally:
            self._drop(key)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _memory(said: dict[str, Any], usual: str) -> int:
    return parse_size(str(said.get("mem") or usual), what="RAM")


def _engine(said: dict[str, Any]) -> str | None:
    engine = said.get("engine") or None
    if engine not in (None, "auto", "kvm", "emulator"):
        raise Invalid("an engine is auto, kvm or emulator")
    return None if engine == "auto" else engine
