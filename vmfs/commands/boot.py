"""`vmfs boot KERNEL`: make a machine, load it, join it to this terminal, and clean up after it."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vmfs.boot import Source, probe
from vmfs.commands import terminal
from vmfs.commands.console import open_console
from vmfs.commands.options import argument, engine, size
from vmfs.host import mounts
from vmfs.words import exits
from vmfs.words.errors import EngineFailed, Invalid, NotPermitted, VmfsError

_CHUNK = 1 << 20
_PATIENCE = 0.5  # seconds of loading before it is told about
DEFAULT_CMDLINE = "console=ttyS0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", metavar="KERNEL", nargs="?", help="a Linux, ELF or multiboot kernel, a boot sector")
    parser.add_argument("--initrd", metavar="FILE", help="its initial RAM disk, or module")
    parser.add_argument("--cmdline", metavar="TEXT", help=f"its command line (default: {DEFAULT_CMDLINE})")
    parser.add_argument("--bios", metavar="FILE", help="a BIOS image: to boot from a disk, or a kernel that needs it")
    parser.add_argument("--mem", type=argument(size), default=512 << 20, metavar="SIZE", help="RAM (default: 512M)")
    parser.add_argument("--disk", action="append", default=[], metavar="FILE[:ro|rw|cow]",
                        help="a raw disk image (default: rw); may be given several times")
    parser.add_argument("--dev", action="append", default=[], metavar="LINE", help="a line for dev/add, as 'net user'")
    parser.add_argument("--engine", type=argument(engine), metavar="kvm|emulator", help="what it runs on")
    parser.add_argument("--on", metavar="DIR",
                        help="the vmfs mount (default: the first that is yours, else one for this time)")
    parser.add_argument("--name", metavar="NAME", help="of the machine (default: boot-PID)")
    parser.add_argument("--keep", action="store_true", help="leave the machine there")
    parser.add_argument("--no-reboot", action="store_true", help="a reset ends it")
    parser.add_argument("--escape", type=argument(terminal.parse_escape), default=terminal.ESCAPE, metavar="KEY",
                        help="the key that ends it, as ^] (the default)")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.kernel and not arguments.bios:
        raise Invalid("it takes a KERNEL, or --bios")
    for path in filter(None, (arguments.kernel, arguments.initrd, arguments.bios)):
        with open_image(path):
            pass
    with ended_by_signals(), mount(arguments.on, keep=arguments.keep) as directory:
        machine = directory / (arguments.name or f"boot-{os.getpid()}")
        try:
            machine.mkdir()
        except OSError as failure:
            raise EngineFailed(f"{machine}: {failure.strerror}") from None
        if arguments.keep:
            try:
                prepare(machine, arguments)
                return drive(machine, arguments)
            finally:
                print(f"vmfs boot: the machine is {machine}", file=sys.stderr)
        with removed_in_any_case(f"rmdir -- {shlex.quote(os.path.abspath(machine))}"):
            prepare(machine, arguments)
            return drive(machine, arguments)


@contextlib.contextmanager
def removed_in_any_case(command: str) -> Iterator[None]:
    """Have a shell run `command` afterwards, in the case that this process is killed, too.

    The shell sees the end of the pipe. It is in a session of its own, so that no key and no hangup of the terminal
    ends it.
    """
    script = f"trap '' TERM; read -r _; exec 2>/dev/null; {command}"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert shell.stdin is not None
        shell.stdin.close()
        shell.wait()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as ^C does: what was made is taken away."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as nohup(1) has it
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def mount(given: str | None, *, keep: bool) -> Iterator[Path]:
    """The mount to use: the one given, one that is there, or a new one for this time.

    Without being told, only one of this user's own: another user's server would get the kernel, the names of the
    disks and the keys.
    """
    if given:
        mounted = mounts.at(given)
        if mounted is None or not mounted.is_vmfs:
            raise Invalid(f"{given} is not a vmfs mount")
        yield Path(given)
        return
    for each in mounts.table():
        is_own = each.is_vmfs and each.user == os.geteuid()  # before anything of it is looked at
        if is_own and not mounts.is_dead(each.path) and os.access(each.path, os.W_OK):
            print(f"vmfs boot: on {each.path}, a mount of yours", file=sys.stderr)
            yield Path(each.path)
            return
    if keep:
        raise Invalid("--keep needs a mount that stays: vmfs mount DIR")
    directory = tempfile.mkdtemp(prefix="vmfs-")
    quoted = shlex.quote(os.path.abspath(directory))
    with removed_in_any_case(f"fusermount3 -u -z -- {quoted}; rmdir -- {quoted}"):
        made = subprocess.run(
            [sys.executable, "-m", "vmfs.cli", "mount", directory], stderr=subprocess.PIPE, text=True, check=False
        )
        if made.returncode:
            raise EngineFailed(made.stderr.strip().removeprefix("vmfs mount: ") or "the mount failed")
        print(f"vmfs boot: on {directory}, a mount for this time", file=sys.stderr)
        yield Path(directory)


# ---- loading


def prepare(machine: Path, arguments: argparse.Namespace) -> None:
    """Write all files of a machine that is to be booted."""
    if arguments.engine and arguments.engine != "auto":
        put(machine, "engine", arguments.engine)
    put(machine, "mem_size", str(arguments.mem))
    put(machine, "machine", "pc")
    for number, disk in enumerate(arguments.disk):
        path, _, way = disk.rpartition(":")
        if not path or way not in ("ro", "rw", "cow"):
            path, way = disk, "rw"
        put(machine, "dev/add", f"blk {shlex.quote(os.path.abspath(path))} {way}", what=f"--disk {number}")
    for line in arguments.dev:
        put(machine, "dev/add", line)
    images = {"kernel": arguments.kernel, "initrd": arguments.initrd, "bios": arguments.bios}
    for name, path in images.items():
        if path:
            copy(Path(path), machine / name)
    if arguments.kernel:
        cmdline = default_cmdline(machine / "kernel") if arguments.cmdline is None else arguments.cmdline
        if cmdline:
            put(machine, "cmdline", cmdline)


def default_cmdline(kernel: Path) -> str:
    """What takes no command line gets none, nor does iPXE, which would run it."""
    with open(kernel, "rb") as file, contextlib.suppress(Invalid):
        if probe(Source.of(file.fileno())) in ("bios", "boot-sector", "bzImage-16"):
            return ""
    return DEFAULT_CMDLINE


def put(machine: Path, name: str, text: str, what: str = "") -> None:
    """Write a text file of the machine; the reason is in its `error`."""
    try:
        with open(machine / name, "w") as file:
            file.write(text + "\n")
    except OSError as failure:
        raise Invalid(f"{what}{': ' if what else ''}{reason(machine, failure)}") from None


def reason(machine: Path, failure: OSError) -> str:
    try:
        said = (machine / "error").read_text().strip()
    except OSError:
        said = ""
    return said or os.strerror(failure.errno or 5)


def open_image(path: str | Path):
    try:
        return open(path, "rb")
    except PermissionError:
        raise NotPermitted(f"{path} is not yours to read") from None
    except OSError as failure:
        raise Invalid(f"{path}: {failure.strerror}") from None


def copy(source: Path, target: Path) -> None:
    """Copy an image, and tell how far it is when that takes a while."""
    began, done, told = time.monotonic(), 0, False
    with open_image(source) as image:
        size = os.fstat(image.fileno()).st_size
        try:
            with open(target, "wb", buffering=0) as file:
                while data := image.read(_CHUNK):
                    while data:
                        written = file.write(data)
                        done, data = done + written, data[written:]
                    if sys.stderr.isatty() and time.monotonic() - began > _PATIENCE:
                        told = True
                        print(f"\r{target.name}: {done >> 20} of {size >> 20} MiB", end="", file=sys.stderr, flush=True)
        except OSError as failure:
            raise EngineFailed(reason(target.parent, failure)) from None
        finally:
            if told:
                print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- running


class Runs(threading.Thread):
    """Reads `vm_run` until the machine is shut down. `done` is readable at the end, and `line` the last exit or
    `failure` what went wrong."""

    def __init__(self, machine: Path, *, reboot: bool) -> None:
        super().__init__(daemon=True)
        self._machine = machine
        self._reboot = reboot
        self.done, self._tell = os.pipe()
        self.line = ""
        self.failure: VmfsError | None = None

    def run(self) -> None:
        try:
            while True:
                self.line = (self._machine / "vm_run").read_text().strip()
                if not (self._reboot and self.line.startswith("shutdown cause=reset ")):
                    return
        except OSError as failure:
            self.failure = EngineFailed(reason(self._machine, failure))
        finally:
            os.write(self._tell, b"\n")


def drive(machine: Path, arguments: argparse.Namespace) -> int:
    """Run it with its console on this terminal; the exit code."""
    console = open_console(str(machine))
    runs = Runs(machine, reboot=not arguments.no_reboot)
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"vmfs boot: {terminal.escape_name(arguments.escape)} ends it", file=sys.stderr)
    runs.start()
    try:
        escaped = terminal.attach(console, done=runs.done, escape=arguments.escape)
    finally:
        os.close(console)
    if escaped:
        print(file=sys.stderr)
        return terminal.ESCAPED
    runs.join()
    if runs.failure is not None:
        raise runs.failure
    print(f"vmfs boot: {runs.line}", file=sys.stderr)
    return exit_code(runs.line)


def exit_code(line: str) -> int:
    """0 where the guest powered off or was reset, its own code from the debug exit, else 1."""
    last = exits.parse_exit(line)
    if not isinstance(last, exits.Shutdown) or last.cause == "triple-fault":
        return 1
    return (last.code or 0) & 0xFF
