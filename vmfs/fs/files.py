"""FILES: the directory of a machine, a row a name; ROOT_FILES: those of the mount. A new file is a row here, which says
who may do what with it, and a row of CONTENTS (`vmfs.machine.files.table`), which says what it gets and puts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmfs import __version__
from vmfs.engine import EngineInfo
from vmfs.engine.base import MACHINE_STATES, VCPU_STATES
from vmfs.fs.forks import ForkFile
from vmfs.fs.inodes import Kind, Scope
from vmfs.fs.kinds import History, Kept, LocalText, Served, Sparse, Stat
from vmfs.fs.mapped import Coverage, Framebuffer, Mem
from vmfs.fs.scopes import RootScope
from vmfs.words import commands
from vmfs.words.registers import REGISTERS


@dataclass(frozen=True, slots=True)
class Row:
    """A file. `mode`: its permission bits, before the maker's umask. `per_cpu`: it stands in cpuN/, too.

    What shows or changes a machine is its owner's, who opens it to others by chmod.
    """

    name: str
    mode: int
    kind: Kind
    per_cpu: bool = False


READ = Served()
WRITE = Served(readable=False, writable=True, sized=False)
BOTH = Served(writable=True)
# What a read does changes the machine, and what it gives has no size.
STREAM = Served(writable=True, acts=True, sized=False, walked=False)
HOT_STREAM = Served(writable=True, acts=True, sized=False, walked=False, hot=True)
HOT = Served(writable=True, hot=True)
HOST = Served(writable=True, asks_host=True)


def _complaint(scope: Scope) -> str:
    return f"{scope.complaint}\n" if scope.complaint else ""


FILES: tuple[Row, ...] = (
    # running
    Row("vm_run", 0o600, HOT_STREAM),
    Row("vm_run.bin", 0o600, HOT_STREAM),
    Row("exit", 0o400, READ),
    Row("exit.bin", 0o400, Served(hot=True)),
    Row("exit.data", 0o600, HOT),
    Row("state", 0o600, Served(writable=True, when_failed="failed\n", hot=True)),
    Row("stat", 0o400, Stat()),
    # state
    *(Row(name, 0o600, HOT if row.hot else BOTH, per_cpu=True) for name, row in VCPU_STATES.items()),
    *(Row(name, 0o600, BOTH) for name in MACHINE_STATES),
    Row("registers", 0o600, BOTH, per_cpu=True),
    Row("mem", 0o600, Mem()),
    Row("dirty", 0o400, Served(acts=True)),
    Row("restore", 0o600, Served(writable=True, asks_host=True, hot=True)),
    Row("fork", 0o200, ForkFile()),
    Row("history", 0o600, History()),
    Row("writer", 0o600, Served(writable=True, acts=True, sized=False)),
    # configuration
    Row("mem_size", 0o600, BOTH),
    Row("cpus", 0o600, BOTH),
    Row("engine", 0o600, BOTH),
    Row("mode", 0o600, BOTH),
    Row("machine", 0o600, BOTH),
    Row("time", 0o600, BOTH),
    Row("born", 0o600, BOTH),
    Row("console", 0o600, STREAM),
    Row("console.log", 0o400, READ),
    Row("hvc", 0o600, STREAM),
    Row("hvc.log", 0o400, READ),
    Row("screen.txt", 0o400, READ),
    Row("screen.png", 0o400, READ),
    Row("framebuffer", 0o600, Framebuffer()),
    Row("keyboard", 0o200, WRITE),
    Row("mouse", 0o200, WRITE),
    Row("vnc", 0o600, HOST),
    # what is booted
    Row("kernel", 0o600, BOTH),
    Row("initrd", 0o600, BOTH),
    Row("bios", 0o600, BOTH),
    Row("cmdline", 0o600, BOTH),
    # interrupts and debugging
    Row("irq", 0o200, Served(readable=False, writable=True, sized=False, hot=True)),
    Row("debug", 0o600, BOTH),
    Row("trace", 0o600, Served(writable=True, sized=False, walked=False, ahead=True)),
    Row("trace.bin", 0o400, Served(sized=False, walked=False, ahead=True)),
    Row("coverage", 0o600, Coverage()),
    Row("symbols", 0o600, BOTH),
    Row("symbols.elf", 0o400, READ),
    Row("virt", 0o600, Served(writable=True, sized=False, walked=False), per_cpu=True),
    Row("pagetable", 0o400, READ, per_cpu=True),
    Row("disasm", 0o600, Served(writable=True, only_shows=True), per_cpu=True),
    Row("stack", 0o400, READ, per_cpu=True),
    Row("core", 0o400, READ),
    Row("why", 0o400, READ),
    Row("gdb", 0o600, HOST),
    Row("gdb.stream", 0o600, Served(writable=True, acts=True, sized=False, walked=False, asks_host=True)),
    Row("error", 0o400, LocalText(_complaint)),
)

# What cpuN/ has beside the files that stand at the top, too: there, these names are the machine's.
CPU_FILES: tuple[Row, ...] = (Row("state", 0o400, READ), Row("stat", 0o400, READ))

# Of dev/, and of each device.
DEV_FILES: tuple[Row, ...] = (
    Row("add", 0o200, Served(readable=False, writable=True, sized=False, asks_host=True)),
    Row("unclaimed", 0o400, READ),
)
_IMAGE = Row("image", 0o400, Sparse(walked=False))
_LOG = Row("log", 0o400, READ)
# Of a device, by what is found, what it has besides.
OWN_FILES: Mapping[int, tuple[Row, ...]] = {
    commands.FOUND_DIRECTORY: (),
    commands.FOUND_DISK: (_IMAGE,),
    commands.FOUND_DRIVE: (_IMAGE, Row("media", 0o600, HOST)),
    commands.FOUND_PORT: (Row("stream", 0o600, STREAM), _LOG),
    commands.FOUND_PRINTER: (Row("stream", 0o400, Served(acts=True, sized=False, walked=False)), _LOG),
    commands.FOUND_SPEAKER: (Row("tone", 0o400, READ),),
    commands.FOUND_CARD: (Row("pcap", 0o600, HOST),),
}
DEVICE_FILES: tuple[Row, ...] = tuple(Row(name, 0o400, READ) for name in ("type", "address", "irq", "counters", "info"))

# Of a snapshot, and of each disk in its disks/.
# The owner may write them by their modes, and only where a saved machine comes in (vmfs.fs.snapshots).
SNAPSHOT_FILES: tuple[Row, ...] = (Row("mem", 0o600, Kept()), Row("state", 0o600, Kept()), Row("info", 0o600, READ))
SNAPSHOT_FOLDERS = ("disks", "images")
SNAPSHOT_HISTORY = "history"  # a folder of those that have a past


def snapshot_file(name: str) -> Row:
    """In one of its folders."""
    return Row(name, 0o600, Kept())


def arriving_file(name: str) -> Row:
    return Row(name, 0o600, BOTH)


def _engine_line(info: EngineInfo) -> str:
    yes_no = ("no", "yes")
    speed = "-" if info.speed is None else f"{info.speed:.3g}"
    reason = info.reason.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return (
        f"{info.name} available={yes_no[info.available]} preferred={yes_no[info.preferred]} "
        f'speed={speed} reason="{reason}"\n'
    )


def _engines(scope: RootScope) -> str:
    return "".join(map(_engine_line, scope.engines))


ROOT_FILES: tuple[Row, ...] = (
    Row("engines", 0o444, LocalText(_engines)),
    Row("machines", 0o444, LocalText(lambda scope: scope.listing())),
    Row("version", 0o444, LocalText(lambda scope: f"{__version__}\n")),
    Row("error", 0o444, LocalText(_complaint)),
)


# ---- reg/


def register_row(name: str, *, writable: bool) -> Row:
    """Of one register or MSR."""
    return Row(name, 0o600 if writable else 0o400, BOTH if writable else READ)


REGISTER_ROWS: Mapping[str, Row] = {
    name: register_row(name, writable=row.writable) for name, row in REGISTERS.items()
}
