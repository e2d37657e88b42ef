"""`vmfs boot FILE`: make a machine, load it, join it to this terminal, and clean up after it."""

import argparse
import contextlib
import errno
import gzip
import io
import json
import lzma
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from vmfs.boot import Source, media, probe
from vmfs.client.mounting import MountFailed, private_mount, removed_in_any_case
from vmfs.commands import seed, terminal
from vmfs.commands.console import open_console
from vmfs.commands.machines import own_mounts
from vmfs.commands.options import argument, engine, size
from vmfs.host import mounts
from vmfs.words import exits
from vmfs.words.errors import EngineFailed, Invalid, NotPermitted, VmfsError
from vmfs.words.images import COMPRESSED, FORMATS, HEAD, format_of
from vmfs.words.numbers import parse_duration

_CHUNK = 1 << 20
_PATIENCE = 0.5  # seconds of loading before it is told about
DEFAULT_CMDLINE = "console=ttyS0"
ROOT_TAG = "root"
NINEP = "trans=virtio,version=9p2000.L"  # how Linux mounts a share
GDB_PORT = 1234  # QEMU's
SEABIOSES = (
    "/usr/share/seabios/bios-256k.bin", "/usr/share/seabios/bios.bin",
    "/usr/share/qemu/bios-256k.bin", "/usr/share/qemu/bios.bin",
)  # fmt: skip
# OVMF's code, and the variable store that it begins with: Debian's, Fedora's, Arch's.
OVMFS = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)
# With Microsoft's keys enrolled, for Secure Boot. Debian's code does it without SMM.
SECURE_OVMFS = (("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),)
_SMALL = 64 << 10
_DRIVES = {"pc": ("ide", "cdrom"), "q35": ("ahci", "ahci-cdrom"), "strict": ("ide", "cdrom")}  # of a kind of machine
_INSIDE = 256 << 10  # of a compressed file, in which is what tells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?",
                        help="a kernel (Linux, ELF, multiboot), or what a BIOS boots: a CD, floppy, disk, boot sector")
    parser.add_argument("--format", choices=FORMATS,
                        help="of FILE, a disk: what its image is, so that it may open the image that it is based on")
    parser.add_argument("--initrd", metavar="FILE", help="its initial RAM disk, or module")
    parser.add_argument("--cmdline", metavar="TEXT", help=f"its command line (default: {DEFAULT_CMDLINE})")
    parser.add_argument("--bios", metavar="FILE", help="a BIOS image (default, where one is needed: SeaBIOS)")
    parser.add_argument("--uefi", action="store_true", help="by UEFI firmware, OVMF; without a FILE to its shell")
    parser.add_argument("--uefi-vars", metavar="FILE",
                        help="where that keeps its variables; made where it is not there (default: for this time only)")
    parser.add_argument("--secure-boot", action="store_true",
                        help="as --uefi, which starts only what is signed: its variables begin with Microsoft's keys")
    parser.add_argument("--machine", choices=tuple(_DRIVES), default="pc",
                        help="what it is: a PC (i440FX), a q35, or a PC that forgives less (default: pc)")
    parser.add_argument("--mem", type=argument(size), default=512 << 20, metavar="SIZE", help="RAM (default: 512M)")
    parser.add_argument("--disk", action="append", default=[], metavar="FILE[:ro|rw|cow]",
                        help="a raw disk image (default: rw); may be given several times")
    parser.add_argument("--cdrom", action="append", default=[], metavar="FILE", help="a CD, on IDE (q35: AHCI)")
    parser.add_argument("--floppy", action="append", default=[], metavar="FILE[:ro|rw|cow]",
                        help="a floppy (default: rw)")
    parser.add_argument("--snapshot", action="store_true", help="forget what is written to disks and floppies")
    parser.add_argument("--share", action="append", default=[], metavar="DIR[:ro|rw]",
                        help="a folder of the host, by 9p, with the tags share0, share1... (default: rw)")
    parser.add_argument("--root", metavar="DIR[:ro|rw]",
                        help="a folder of the host as root file system of Linux, by 9p (default: rw)")
    parser.add_argument("--ssh-key", action="append", default=[], metavar="FILE",
                        help="of a cloud image: let this public key log in by ssh; may be given several times")
    parser.add_argument("--user", type=argument(seed.check_user), metavar="NAME",
                        help="the user that has the key, who may sudo (default: the image's own)")
    parser.add_argument("--net", action="append", default=[], metavar="LINE",
                        help="a network card, as 'user', 'user model=e1000', 'wire NAME' or 'tap NAME'")
    parser.add_argument("--forward", action="append", default=[], metavar="[ADDRESS/]PORT:PORT",
                        help="a TCP port of the host's that is the guest's, of the first `--net user`, or of one more")
    parser.add_argument("--dev", action="append", default=[], metavar="LINE", help="a line for dev/add, as 'net user'")
    parser.add_argument("--engine", type=argument(engine), metavar="kvm|emulator", help="what it runs on")
    parser.add_argument("--on", metavar="DIR",
                        help="the vmfs mount (default: the first that is yours, else one for this time)")
    parser.add_argument("--name", metavar="NAME", help="of the machine (default: boot-PID)")
    parser.add_argument("--keep", action="store_true", help="leave the machine there")
    parser.add_argument("--no-reboot", action="store_true", help="a reset ends it")
    parser.add_argument("--gdb", type=argument(port), nargs="?", const=GDB_PORT, metavar="PORT",
                        help=f"let a gdb connect there, on 127.0.0.1 (default: {GDB_PORT}; 0: a free one)")
    parser.add_argument("--paused", action="store_true", help="do not start it: a gdb does, or `run` to its `state`")
    parser.add_argument("--symbols", metavar="FILE", help="an ELF file or a System.map with its symbols")
    parser.add_argument("--break", action="append", default=[], metavar="WHERE", dest="breaks",
                        help="stop before the instruction at a symbol, FILE:LINE or an address; several times, too")
    parser.add_argument("--timeout", type=argument(parse_duration), metavar="TIME", help="end it after that, as 30s")
    parser.add_argument("--log", metavar="FILE", help="write what comes from the console into a file, too")
    parser.add_argument("--json", action="store_true",
                        help="one line of JSON on stdout at the end; the console goes to stderr")
    parser.add_argument("--escape", type=argument(terminal.parse_escape), default=terminal.ESCAPE, metavar="KEY",
                        help="the key that ends it, as ^] (the default)")


@dataclass(frozen=True)
class End:
    """`why`: "exit", "escape", "timeout". `exit`: the last one of the machine, or empty. `code`: of this command."""

    why: str
    exit: str
    code: int


def run(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        return boot(arguments).code
    began = time.monotonic()
    said: dict[str, Any] = {}
    try:
        end = boot(arguments)
        said = {"ended": end.why, "exit": end.exit, "code": end.code}
    except VmfsError as failure:
        said = {"ended": "error", "error": str(failure), "code": 1}
        raise
    finally:
        if said:
            print(json.dumps(said | {"seconds": round(time.monotonic() - began, 3)}), flush=True)
    return end.code


def boot(arguments: argparse.Namespace) -> End:
    plan = plan_of(arguments)
    for path in filter(None, (arguments.initrd, plan.bios, arguments.symbols)):
        with open_image(path):
            pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        outputs = [sys.stderr.fileno() if arguments.json else sys.stdout.fileno()]
        if arguments.log:
            outputs.append(stack.enter_context(log_file(arguments.log)).fileno())
        directory, mount_stays = stack.enter_context(mount(arguments.on, keep=arguments.keep))
        machine = directory / (arguments.name or f"boot-{os.getpid()}")
        try:
            machine.mkdir()
        except OSError as failure:
            raise EngineFailed(f"{machine}: {failure.strerror}") from None
        if arguments.keep:
            try:
                prepare(machine, arguments, plan)
                return drive(machine, arguments, outputs)
            finally:
                print(f"vmfs boot: the machine is {machine}", file=sys.stderr)
        with removed_in_any_case(f"rmdir -- {shlex.quote(os.path.abspath(machine))}") as machine_stays:
            prepare(machine, arguments, plan)
            end = drive(machine, arguments, outputs)
            if end.code == EXIT_CODES["triple-fault"]:
                tell_of_a_fault(machine)
                if sys.stderr.isatty():  # somebody is there to look at it, and to remove it
                    machine_stays()
                    mount_stays()
                    print(f"vmfs boot: the machine is {machine}, to look at; rmdir removes it", file=sys.stderr)
            return end


def log_file(path: str) -> io.FileIO:
    try:
        return open(path, "wb", buffering=0)
    except OSError as failure:
        raise Invalid(f"--log {path}: {failure.strerror}") from None


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
def mount(given: str | None, *, keep: bool) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The mount to use: the one given, one that is there, or a new one for this time; and what makes that one stay.

    Without being told, only one of this user's own: another user's server would get the kernel, the names of the
    disks and the keys.
    """
    if given:
        mounted = mounts.at(given)
        if mounted is None or not mounted.is_vmfs:
            raise Invalid(f"{given} is not a vmfs mount")
        yield Path(given), _nothing
        return
    for path in own_mounts():
        if os.access(path, os.W_OK) and mounts.has_room(path):
            print(f"vmfs boot: on {path}, a mount of yours", file=sys.stderr)
            yield path, _nothing
            return
    if keep:
        raise Invalid("--keep needs a mount that stays: vmfs mount DIR")
    stays: list[Callable[[], None]] = []
    try:
        with private_mount(staying=stays.append) as directory:
            print(f"vmfs boot: on {directory}, a mount for this time", file=sys.stderr)
            yield directory, stays[0]
    except MountFailed as failure:
        raise EngineFailed(str(failure)) from None


def _nothing() -> None:
    pass


# ---- loading


@dataclass
class Plan:
    """What a machine gets: a kernel with words for its command line, a BIOS, and lines for dev/add in the order in
    which a BIOS tries them, each with what it is called in an error."""

    kernel: str | None = None
    words: str = ""
    bios: str | None = None
    seed: dict[str, bytes] = field(default_factory=dict)  # files of a cloud image's
    lines: list[tuple[str, str]] = field(default_factory=list)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the arguments say, and what is in FILE. Invalid, before anything is made, for what cannot be booted."""
    plan = Plan(bios=arguments.bios, seed=seed_of(arguments))
    is_uefi = arguments.uefi or arguments.secure_boot or arguments.uefi_vars is not None
    if is_uefi:
        if plan.bios:
            raise Invalid("--uefi and --bios: a machine begins with one of both")
    needs_bios = False
    if arguments.file:
        path, mode = split_mode(arguments.file)
        with open_image(path) as image:
            source, found = Source.of(image.fileno(), path), arguments.format or format_of(image.read(HEAD))
            if is_uefi and found == "raw" and media.is_efi(source):
                kind = media.KERNEL
            else:
                kind = media.tell(source) if found == "raw" else told_inside(path, found)
            if found != "raw":
                mode = mode or "cow"
            if arguments.snapshot and mode != "ro":
                mode = "cow"
            if arguments.format and kind in (media.BIOS, media.KERNEL):
                raise Invalid(f"--format is for a disk, and {path} is a {kind}")
            if kind == media.BIOS:
                if is_uefi:
                    raise Invalid(f"{path}: a BIOS, and --uefi is another: --bios takes it")
                plan.kernel = path
            elif kind == media.KERNEL:
                plan.kernel = path
                if is_uefi and not media.is_efi(source):
                    raise Invalid(f"{path}: a kernel without an EFI stub, which UEFI cannot start; without --uefi it "
                                  "is started directly")  # fmt: skip
                needs_bios = not is_uefi and probe(source) == "bzImage-16"
            else:
                needs_bios = True
                if not is_uefi and not plan.bios and found == "raw" and media.needs_uefi(source):
                    is_uefi = True
                    print(f"vmfs boot: {path} has nothing that a BIOS boots: by UEFI firmware", file=sys.stderr)
                line = _line_of(kind, path, mode, source.size, arguments.machine)
                plan.lines.append((f"{line} format={arguments.format}" if arguments.format else line, path))
    for disk in arguments.disk:
        path, mode = disk_mode(disk, arguments)
        plan.lines.append((f"blk {quoted(path)} {mode}", "--disk"))
    _, cdrom = _DRIVES[arguments.machine]
    plan.lines += ((f"{cdrom} {quoted(path)}", "--cdrom") for path in arguments.cdrom)
    for floppy in arguments.floppy:
        path, mode = disk_mode(floppy, arguments)
        plan.lines.append((f"floppy {quoted(path)} {mode}", "--floppy"))
    plan_nets(plan, arguments.net, arguments.forward)
    if arguments.root is not None:
        mode = split_mode(arguments.root)[1] or "rw"
        plan.words = f"root={ROOT_TAG} rootfstype=9p rootflags={NINEP},cache=loose {mode}"
    if not arguments.file and not plan.lines and not plan.bios and not is_uefi:
        raise Invalid("it takes a FILE to boot, or --cdrom, --floppy, --disk or --bios")
    for name in ("initrd", "cmdline", "root"):
        if getattr(arguments, name) is not None and plan.kernel is None:
            raise Invalid(f"--{name} is for a kernel, and there is none: firmware boots what it finds")
    plan.lines += share_lines(arguments)
    if is_uefi:
        plan.lines[:0] = flash_lines(arguments.uefi_vars, SECURE_OVMFS if arguments.secure_boot else OVMFS)
        return plan
    if (needs_bios or not arguments.file) and plan.bios is None:
        plan.bios = seabios()
    return plan


def share_lines(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    shares = [(f"share{number}", "--share", *split_mode(one)) for number, one in enumerate(arguments.share)]
    if arguments.root is not None:
        shares.append((ROOT_TAG, "--root", *split_mode(arguments.root)))
    return [(f"share {quoted(path)} {tag} {'ro' if mode == 'ro' else 'rw'}", what) for tag, what, path, mode in shares]


def plan_nets(plan: Plan, lines: Sequence[str], forwards: Sequence[str]) -> None:
    """Network cards, and what leads to the first one that is a user's network."""
    try:
        words = [shlex.split(line) for line in lines]
    except ValueError as error:
        raise Invalid(f"--net: {error}") from None
    if not all(words):
        raise Invalid("--net: it is as 'user', 'wire NAME' or 'tap NAME'")
    if forwards:
        first = next((one for one in words if one[0] == "user"), None)
        if first is None:
            words.insert(0, first := ["user"])
        first += (f"tcp={forward}" for forward in forwards)
    for one in words:
        plan.lines.append((f"net {shlex.join(one)}", f"--net {one[0]}"))


_OPENERS: dict[str, Callable[[str], Any]] = {"gz": gzip.open, "xz": lzma.open, "zstd": zstandard.open}


def told_inside(path: str, found: str) -> str:
    """What an image of another format than raw is of: a disk, or, of a compressed one, what its beginning says."""
    if found not in COMPRESSED:
        return media.DISK
    try:
        with _OPENERS[found](path) as file:
            head = file.read(_INSIDE)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise Invalid(f"{path}: it begins as {found}, and does not decompress: {error}") from None
    if format_of(head) != "raw":
        return media.DISK
    with tempfile.TemporaryFile() as file:
        file.write(head)
        file.flush()
        kind = media.tell(Source.of(file.fileno(), f"{path}, decompressed"))
    if kind in (media.KERNEL, media.BIOS):
        raise Invalid(f"{path}: a compressed {kind}, which is not loaded as it is: decompress it first")
    return kind


def disk_mode(text: str, arguments: argparse.Namespace) -> tuple[str, str]:
    """FILE and how it is opened."""
    path, mode = split_mode(text)
    return path, "cow" if arguments.snapshot and mode != "ro" else mode or "rw"


def split_mode(text: str) -> tuple[str, str]:
    """FILE[:ro|rw|cow]; the mode is empty where there is none."""
    path, _, mode = text.rpartition(":")
    return (path, mode) if path and mode in ("ro", "rw", "cow") else (text, "")


def _line_of(kind: str, path: str, mode: str, size: int, machine: str) -> str:
    disk, cdrom = _DRIVES[machine]
    if kind == media.CD:
        return f"{cdrom} {quoted(path)}"
    if kind == media.FLOPPY:
        return f"floppy {quoted(path)} {mode or 'rw'}"
    # A boot sector, perhaps with a little after it, is no disk that somebody keeps anything on.
    return f"{disk} {quoted(path)} {mode or ('cow' if size <= _SMALL or size % media.SECTOR else 'rw')}"


def quoted(path: str) -> str:
    return shlex.quote(os.path.abspath(path))


def flash_lines(variables: str | None, choices: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Lines for OVMF's code and its variables. Those of a file of the user's are kept there."""
    code, template = ovmf(choices)
    if variables is None:
        return [(f"pflash {quoted(code)} ro", code), (f"pflash {quoted(template)} cow", template)]
    if not os.path.exists(variables):
        try:
            with open_image(template) as image, open(variables, "xb") as file:
                file.write(image.read())
        except OSError as failure:
            raise Invalid(f"{variables}: {failure.strerror}") from None
    return [(f"pflash {quoted(code)} ro", code), (f"pflash {quoted(variables)} rw", f"--uefi-vars {variables}")]


def ovmf(choices: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The host's OVMF. Invalid where there is none."""
    for pair in choices:
        if all(os.access(path, os.R_OK) for path in pair):
            return pair
    raise Invalid(
        f"UEFI firmware is not there, at {' and '.join(choices[0])}: install Debian's package ovmf, or attach another "
        "one by --dev 'pflash PATH ro'"
    )


def seabios() -> str:
    """The host's SeaBIOS. Invalid where there is none."""
    for path in SEABIOSES:
        if os.access(path, os.R_OK):
            return path
    raise Invalid(f"a BIOS has to boot that, and there is none at {SEABIOSES[0]}: install Debian's package seabios, or "
                  "name one by --bios")  # fmt: skip


def seed_of(arguments: argparse.Namespace) -> dict[str, bytes]:
    """The files of a cloud image's seed; none where none is asked for."""
    if not arguments.ssh_key:
        if arguments.user is not None:
            raise Invalid("--user: who logs in takes a key: --ssh-key FILE")
        return {}
    keys = []
    for path in arguments.ssh_key:
        with open_image(path) as file:
            keys += seed.keys_of(path, file.read(1 << 20))
    return seed.files(arguments.user, keys)


def prepare(machine: Path, arguments: argparse.Namespace, plan: Plan) -> None:
    """Write all files of a machine that is to be booted."""
    if arguments.engine and arguments.engine != "auto":
        put(machine, "engine", arguments.engine)
    put(machine, "mem_size", str(arguments.mem))
    put(machine, "machine", arguments.machine)
    for line, what in plan.lines:
        put(machine, "dev/add", line, what=what)
    if plan.seed:
        with tempfile.NamedTemporaryFile(prefix="vmfs-seed-") as file:  # the machine has it open afterwards
            seed.write(file, plan.seed)
            file.flush()
            put(machine, "dev/add", f"blk {quoted(file.name)} ro format=raw", what="--ssh-key")
    for line in arguments.dev:
        put(machine, "dev/add", line, what="--dev")
    images = {"kernel": plan.kernel, "initrd": arguments.initrd, "bios": plan.bios}
    for name, path in images.items():
        if path:
            copy(Path(path), machine / name)
    if plan.kernel:
        cmdline = default_cmdline(machine / "kernel") if arguments.cmdline is None else arguments.cmdline
        if cmdline or plan.words:
            put(machine, "cmdline", f"{cmdline} {plan.words}".strip())
    if arguments.symbols:
        copy(Path(arguments.symbols), machine / "symbols")
    elif plan.kernel and is_elf(plan.kernel):
        with contextlib.suppress(Invalid):  # it may have none
            copy(Path(plan.kernel), machine / "symbols")
            arguments.symbols = plan.kernel
    for where in arguments.breaks:
        try:
            put(machine, "debug", f"break {where}", what=f"--break {where[:40]}")
        except Invalid as error:
            if arguments.symbols:
                raise
            raise Invalid(f"{error}; `--symbols FILE` tells of some: a System.map or a vmlinux") from None
    if arguments.gdb is not None:
        put(machine, "gdb", f"127.0.0.1:{arguments.gdb}", what=f"--gdb {arguments.gdb}")


def is_elf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


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
        said = reason(machine, failure)
        if what:  # that is where the user wrote it, not the file
            said = f"{what}: {said.removeprefix(f'{os.path.basename(name)}: ').removeprefix(f'{name}: ')}"
        raise Invalid(said) from None


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
    """Runs a machine until its end, and waits through all stops that are none. `news` is readable where there is a text
    to `hear`, or the end; `line` is the last exit or `failure` what went wrong."""

    def __init__(self, machine: Path, *, reboot: bool, paused: bool) -> None:
        super().__init__(daemon=True)
        self._machine = machine
        self._reboot = reboot
        self._paused = paused
        self._said = ""
        self.news, self._tell = os.pipe()
        self._texts: deque[str] = deque()
        self._is_over = False
        self.line = ""
        self.failure: VmfsError | None = None
        self.timed_out = False

    def run(self) -> None:
        try:
            with open(self._machine / "exit", "rb", buffering=0) as exits_file:
                self._go(exits_file)
        except OSError as failure:
            self.failure = EngineFailed(reason(self._machine, failure))
        finally:
            self._end()

    def hear(self) -> str | None:
        """The next text, once `news` is readable; "" where there is none, None at the end."""
        os.read(self.news, 1)
        if self._texts:
            return self._texts.popleft()
        return None if self._is_over else ""

    def _say(self, text: str) -> None:
        self._texts.append(text)
        os.write(self._tell, b"\n")

    def _end(self) -> None:
        self._is_over = True
        os.write(self._tell, b"\n")

    def _go(self, exits_file: io.FileIO) -> None:
        starts = not self._paused
        _last_exit(exits_file)  # what was before is not news
        while True:
            if starts and self._start():
                self.line = _last_exit(exits_file)
            else:  # another one runs it, or will
                self.line = _next_exit(exits_file)
            if self.timed_out or (is_end(self.line) and not self._restarts()):
                return
            starts = is_end(self.line)
            if not starts:
                self._tell_of_a_stop()

    def _restarts(self) -> bool:
        return self._reboot and self.line.startswith("shutdown cause=reset ")

    def _start(self) -> bool:
        """Run it here; False where another one has begun to."""
        try:
            (self._machine / "vm_run").read_bytes()
        except OSError as failure:
            if failure.errno == errno.EBUSY:
                return False
            raise
        return True

    def _tell_of_a_stop(self) -> None:
        """Once for a stop, not for each step of a debugger."""
        if self.line != self._said and not self.line.startswith("debug cause=step "):
            self._said = self.line
            self._say(f"it stands: {self.line}; `echo run > {self._machine}/state` or a gdb goes on")

    def time_out(self) -> None:
        """End it. From any thread."""
        self.timed_out = True
        with contextlib.suppress(OSError):
            (self._machine / "state").write_text("pause\n")
        self._end()


def _last_exit(file: io.FileIO) -> str:
    file.seek(0)
    return file.read().decode().strip()


def _next_exit(file: io.FileIO) -> str:
    """The exit that comes after the one that `file` was last read with."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    poll.poll()
    return _last_exit(file)


def is_end(line: str) -> bool:
    """Whether nothing but a reset leads on from there: off, or asleep for good, or what the engine could not do."""
    return line.partition(" ")[0] in ("shutdown", "hlt", "error") and not line.startswith("shutdown cause=suspend ")


def drive(machine: Path, arguments: argparse.Namespace, outputs: Sequence[int]) -> End:
    """Run it with its console on this terminal."""
    console = open_console(str(machine))
    is_terminal = sys.stdin is not None and sys.stdin.isatty()

    def say(text: str) -> None:
        # The terminal may be raw, and in the middle of a line of the guest's.
        print(f"\r\nvmfs boot: {text}\r" if is_terminal else f"vmfs boot: {text}", file=sys.stderr, flush=True)

    if is_terminal:
        print(f"vmfs boot: {terminal.escape_name(arguments.escape)} ends it", file=sys.stderr)
    if arguments.gdb is not None:
        symbols = f"{shlex.quote(arguments.symbols)} " if arguments.symbols else ""
        print(f"vmfs boot: gdb {symbols}-ex 'target remote {gdb_address(machine)}'", file=sys.stderr)
    if arguments.paused:
        how = "`continue` in gdb, or " if arguments.gdb is not None else ""
        print(f"vmfs boot: it waits for {how}`echo run > {machine}/state`", file=sys.stderr)
    def hear() -> bool:
        if text := runs.hear():
            say(text)
        return text is None

    runs = Runs(machine, reboot=not arguments.no_reboot, paused=arguments.paused)
    runs.start()
    timer = threading.Timer(arguments.timeout or 0, runs.time_out)
    timer.daemon = True
    if arguments.timeout is not None:
        timer.start()
    try:
        escaped = terminal.attach(console, news=runs.news, hear=hear, escape=arguments.escape, outputs=outputs)
    finally:
        timer.cancel()
        os.close(console)
    if escaped:
        print(file=sys.stderr)
        return End("escape", runs.line, EXIT_CODES["escape"])
    if runs.timed_out:
        print(f"vmfs boot: the time is over: {runs.line or 'it ran'}", file=sys.stderr)
        return End("timeout", runs.line, EXIT_CODES["timeout"])
    runs.join()
    if runs.failure is not None:
        raise runs.failure
    print(f"vmfs boot: {runs.line}", file=sys.stderr)
    return End("exit", runs.line, exit_code(runs.line))


def gdb_address(machine: Path) -> str:
    return (machine / "gdb").read_text().split()[0]


def tell_of_a_fault(machine: Path) -> None:
    """Where it was, for one that nobody can look at any more soon."""
    with contextlib.suppress(OSError):
        values = dict(line.split(" ", 1) for line in (machine / "registers").read_text().splitlines())
        shown = (f"{name} {int(values[name], 16):#x}" for name in FAULT_REGISTERS if name in values)
        print("vmfs boot:", ", ".join(shown), file=sys.stderr)


# As far as they are not the guest's own: those of a debug exit are odd.
EXIT_CODES = {"poweroff": 0, "reset": 0, "escape": terminal.ESCAPED, "triple-fault": 6, "timeout": 8, "hlt": 10}
FAULT_REGISTERS = ("rip", "rsp", "rflags", "cs", "cr0", "cr2", "cr3", "cr4", "efer")


def exit_code(line: str) -> int:
    """As EXIT_CODES has it, the guest's own from the debug exit, else 1."""
    last = exits.parse_exit(line)
    if isinstance(last, exits.Shutdown):
        return EXIT_CODES.get(last.cause, (last.code or 0) & 0xFF)
    return EXIT_CODES.get(line.partition(" ")[0], 1)


def port(text: str) -> int:
    """A TCP port. A word after --gdb that is none is perhaps the kernel."""
    if not text.isascii() or not text.isdigit() or int(text) > 0xFFFF:
        raise Invalid(f"{text[:40]!r} is no port: write FILE before --gdb")
    return int(text)
