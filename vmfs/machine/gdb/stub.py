"""The commands of the protocol: a packet's payload goes in, the reply's comes out, or what to run.

COMMANDS and QUERIES have a row each; what is in neither is answered with nothing, which says that it is not
supported. A peer may send anything: whatever does not parse is an error reply, and changes nothing.

Source: GDB manual, appendix E, "Packets", "Stop Reply Packets", "General Query Packets".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from vmfs.machine.gdb.inferior import Inferior, Stop
from vmfs.machine.gdb.packets import MOST, escape
from vmfs.machine.gdb.target import DEFAULT, Layout, layout
from vmfs.machine.journey import Journey
from vmfs.machine.runloop import Bound
from vmfs.words import exits
from vmfs.words.errors import BadAddress, Gone, Invalid, VmfsError
from vmfs.words.exits import Exit

PACKET_SIZE = MOST // 2
_READ_MOST = PACKET_SIZE // 2 - 8  # bytes whose hexadecimal form a packet has room for
_FIRST = 1  # the thread that is CPU 0; thread 0 means any

# What gdb numbers signals by (include/gdb/signals.def); `handle SIGUSR1 nostop noprint` is about these.
SIGNALS: Mapping[str, int] = {
    "HUP": 1,
    "INT": 2,
    "ILL": 4,
    "TRAP": 5,
    "SEGV": 11,
    "STOP": 17,
    "USR1": 30,
    "USR2": 31,
    "PWR": 32,
}
_SHUTDOWN_SIGNALS = {"triple-fault": "SEGV", "reset": "HUP", "poweroff": "PWR", "debug-exit": "PWR", "suspend": "PWR"}
_EXIT_SIGNALS: Mapping[type[Exit], str] = {
    exits.Io: "USR1",
    exits.Mmio: "USR2",
    exits.Hlt: "STOP",
    exits.Debug: "TRAP",
    exits.Interrupted: "INT",
    exits.Limit: "TRAP",
    exits.Error: "ILL",
}
_PASSABLE = (exits.Io, exits.Mmio, exits.Hlt)  # a program goes on after them


@dataclass(frozen=True, slots=True)
class Resume:
    """What is to run: until something stops it; `step`: one instruction, or those from `start` to `end`. `cpu`: the one
    that does while the others stand still; None is all, or, of a step, the one that is looked at. `reverse`: backwards,
    through the machine's past."""

    step: bool = False
    start: int = 0
    end: int = 0
    cpu: int | None = None
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class Bye:
    """The session ends, after a last reply or without one."""

    reply: bytes | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user's console, and the reply that follows it."""

    text: str
    reply: bytes


Run = Callable[[Bound], Exit]
Tell = Callable[[str], None]  # text for the user, while the guest runs
Answer = bytes | Resume | Said | Bye


_NUMBER = re.compile(rb"[0-9a-fA-F]{1,16}")
_QUERY = re.compile(rb"([A-Za-z.]+)([:,]?)(.*)", re.DOTALL)


class Malformed(Exception):
    """A packet that does not parse."""


def _number(text: bytes) -> int:
    """Hexadecimal, as all numbers in packets."""
    if not _NUMBER.fullmatch(text):
        raise Malformed
    return int(text, 16)


def _numbers(text: bytes, count: int) -> list[int]:
    parts = text.split(b",")
    if len(parts) != count:
        raise Malformed
    return [_number(part) for part in parts]


def _unhex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise Malformed from None


def _hex(data: bytes) -> bytes:
    return data.hex().encode()


def _thread(text: bytes) -> int:
    """-1 is all, 0 is any."""
    if text == b"-1":
        return -1
    return _number(text)


def console_text(text: str) -> bytes:
    """An O packet."""
    return b"O" + _hex(text.encode())


def error_reply(error: Exception) -> bytes:
    if isinstance(error, Malformed):
        return b"E22"
    if isinstance(error, VmfsError) and 0 < error.errno < 100:
        return b"E%02d" % error.errno
    return b"E01"


class Stub:
    """The stub of one session."""

    def __init__(self, inferior: Inferior, layout_name: str = "", *, linear: bool = False) -> None:
        self.inferior = inferior
        self.layout_name = layout_name
        self.linear = linear
        self.no_acknowledgements = False  # asked for; from the next packet on
        self._layout: Layout | None = None
        self._pass: frozenset[int] = frozenset()
        self._last_stop: bytes | None = None
        self._resumed: int | None = None  # the CPU that Hc has named

    def layout(self) -> Layout:
        """Settled when it is first needed, for the rest of the session."""
        if self._layout is None:
            avx = self.inferior.avx()
            self._layout = layout(self.layout_name or self._usual_layout(), avx=avx, linear=self.linear)
        return self._layout

    # ---- a packet

    def answer(self, payload: bytes) -> Answer:
        """Gone when the machine is removed; all other failures are error replies."""
        try:
            for prefix, handler in _BY_LETTER.get(payload[:1], ()):
                if payload.startswith(prefix):
                    return handler(self, payload[len(prefix) :])
            return b""
        except Malformed as error:
            return error_reply(error)
        except VmfsError as error:
            self._check(error)
            return error_reply(error)

    def _check(self, error: VmfsError) -> None:
        """Leave the sentence where one finds it, for a reply has no room for it: but a gdb looks at much that is not
        mapped. Gone is nobody's to catch."""
        if isinstance(error, Gone):
            raise error
        if isinstance(error, BadAddress):
            return
        self.inferior.surroundings.complain(f"gdb: {error}")

    # ---- registers

    def _read_all(self, _arguments: bytes) -> bytes:
        rows = self.layout().registers
        return _hex(b"".join(self.inferior.read_registers(rows)))

    def _write_all(self, arguments: bytes) -> bytes:
        data, values = _unhex(arguments), {}
        rows = self.layout().registers
        if len(data) != sum(row.size for row in rows):
            raise Malformed
        at = 0
        for row in rows:
            values[row] = int.from_bytes(data[at : at + row.size], "little")
            at += row.size
        self.inferior.write_registers(values)
        return b"OK"

    def _read_one(self, arguments: bytes) -> bytes:
        rows = self.layout().registers
        number = _number(arguments)
        if number >= len(rows):
            raise Malformed
        return _hex(self.inferior.read_registers((rows[number],))[0])

    def _write_one(self, arguments: bytes) -> bytes:
        text, _, value = arguments.partition(b"=")
        rows = self.layout().registers
        number, data = _number(text), _unhex(value)
        if number >= len(rows) or len(data) != rows[number].size:
            raise Malformed
        try:
            self.inferior.write_registers({rows[number]: int.from_bytes(data, "little")})
        except Invalid as error:
            self._check(error)
            return b"E." + str(error).encode()
        return b"OK"

    # ---- memory

    def _read_memory(self, arguments: bytes) -> bytes:
        address, length = _numbers(arguments, 2)
        return _hex(self.inferior.read_memory(address, min(length, _READ_MOST)))

    def _read_binary(self, arguments: bytes) -> bytes:
        address, length = _numbers(arguments, 2)
        return b"b" + escape(self.inferior.read_memory(address, min(length, _READ_MOST)))

    def _write_memory(self, arguments: bytes) -> bytes:
        return self._write(arguments, _unhex)

    def _write_binary(self, arguments: bytes) -> bytes:
        return self._write(arguments, bytes)

    def _write(self, arguments: bytes, decode: Callable[[bytes], bytes]) -> bytes:
        where, colon, text = arguments.partition(b":")
        address, length = _numbers(where, 2)
        data = decode(text)
        if not colon or len(data) != length:
            raise Malformed
        if data:
            self.inferior.write_memory(address, data)
        return b"OK"

    # ---- points

    def _insert(self, arguments: bytes) -> bytes:
        stop, kind = _point(arguments)
        if stop is None:
            return b""
        self.inferior.insert(stop, kind)
        return b"OK"

    def _remove(self, arguments: bytes) -> bytes:
        stop, kind = _point(arguments)
        if stop is None:
            return b""
        self.inferior.remove(stop, kind)
        return b"OK"

    # ---- running

    def _continue(self, arguments: bytes) -> Answer:
        self._jump(arguments)
        return Resume()

    def _step(self, arguments: bytes) -> Answer:
        self._jump(arguments)
        return Resume(step=True)

    def _continue_with_signal(self, arguments: bytes) -> Answer:
        """A guest has no signals: only the address means something."""
        return self._continue(_after_signal(arguments))

    def _step_with_signal(self, arguments: bytes) -> Answer:
        return self._step(_after_signal(arguments))

    def _reverse_continue(self, _arguments: bytes) -> Answer:
        return Resume(reverse=True)

    def _reverse_step(self, _arguments: bytes) -> Answer:
        return Resume(step=True, reverse=True, cpu=self._resumed)

    def _jump(self, address: bytes) -> None:
        if address:
            rows = self.layout()
            self.inferior.write_registers({rows.registers[rows.pc]: _number(address)})

    def _resume(self, arguments: bytes) -> Answer:
        resume = _resumption(arguments, self.inferior.cpu_count)
        return resume if resume.cpu is None or self.inferior.cpu_count > 1 else replace(resume, cpu=None)

    def resume(self, what: Resume, run: Run, tell: Tell) -> bytes:
        """Run, and the reply when it has stopped. `tell` gets what no stop reply can say."""
        try:
            self.inferior.settle(stepping=what.step)
            exit_ = self._run(what, run)
        except VmfsError as error:
            self._check(error)
            tell(f"vmfs: {error}\n")
            return self.stop_reply(0)
        return self._stopped(exit_, tell, reverse=what.reverse)

    def _run(self, what: Resume, run: Run) -> Exit:
        bound = Bound(cpu=what.cpu)
        if what.reverse:
            cpu = self.inferior.cpu if what.cpu is None else what.cpu
            return run(Bound(journey=Journey(back=1, cpu=cpu) if what.step else Journey(before=True)))
        if what.step:
            cpu = self.inferior.cpu if what.cpu is None else what.cpu
            # A stub may stop inside of a range; one whose addresses are linear does, after every instruction.
            bound = Bound(steps=1, within=(what.start, what.end) if what.end and not self.linear else None, cpu=cpu)
        while True:
            exit_ = run(bound)
            if not isinstance(exit_, _PASSABLE) or SIGNALS[_EXIT_SIGNALS[type(exit_)]] not in self._pass:
                return exit_
            if what.step and getattr(exit_, "direction", "") not in ("in", "read"):  # those are not executed yet
                return exits.Debug(cause="step", rip=exit_.rip, cpu=exit_.cpu)

    def _stopped(self, exit_: Exit, tell: Tell, *, reverse: bool = False) -> bytes:
        self.inferior.cpu = exit_.cpu
        signal = SIGNALS[_signal_of(exit_)]
        reason = b""
        if isinstance(exit_, exits.Debug) and exit_.cause != "step":
            found = self.inferior.stop_of(exit_.id)
            if found is None:
                tell(f"vmfs: {exit_.line()}\n")
            else:
                reason = _reason(*found, exit_)
        elif reverse and self.inferior.is_at_begin:
            reason = b"replaylog:begin;"
        elif not isinstance(exit_, exits.Debug | exits.Interrupted):
            tell(f"vmfs: {exit_.line()}\n")
        self._last_stop = self.stop_reply(signal, reason)
        return self._last_stop

    def stop_reply(self, signal: int, reason: bytes = b"") -> bytes:
        rows = self.layout()
        numbers = rows.expedited
        values = self.inferior.read_registers([rows.registers[number] for number in numbers])
        words = b"".join(b"%02x:%b;" % (number, _hex(value)) for number, value in zip(numbers, values, strict=True))
        return b"T%02x%b%bthread:%x;" % (signal, words, reason, _FIRST + self.inferior.cpu)

    def _why(self, _arguments: bytes) -> bytes:
        """`?`: the machine stands still for gdb, whatever ran it."""
        try:
            self.inferior.pause()
        except VmfsError as error:  # what cannot be booted: the first run will say so, too
            self._check(error)
        if self._last_stop is None:
            last = self.inferior.last_exit
            self.inferior.cpu = last.cpu if last else 0
            is_over = last is not None and self.inferior.vm.state in ("shutdown", "halted")
            self._last_stop = self.stop_reply(SIGNALS[_signal_of(last) if last and is_over else "TRAP"])
        return self._last_stop

    # ---- the end

    def _detach(self, _arguments: bytes) -> Answer:
        return Bye(b"OK")

    def _kill(self, _arguments: bytes) -> Answer:
        return Bye()

    def _v_kill(self, _arguments: bytes) -> Answer:
        return Bye(b"OK")

    # ---- threads: the CPUs

    def _cpu(self, text: bytes) -> int | None:
        """The CPU that is a thread; None for any or all. Malformed for one that there is not."""
        number = _thread(text)
        if number in (0, -1):
            return None
        if not _FIRST <= number < _FIRST + self.inferior.cpu_count:
            raise Malformed
        return number - _FIRST

    def _select(self, arguments: bytes) -> bytes:
        """Hg: whose registers and addresses the next packets mean. Hc: which CPU `bs` means."""
        if arguments[:1] not in (b"g", b"c"):
            raise Malformed
        cpu = self._cpu(arguments[1:])
        if arguments[:1] == b"g" and cpu is not None:
            self.inferior.cpu = cpu
        elif arguments[:1] == b"c":
            self._resumed = cpu
        return b"OK"

    def _is_alive(self, arguments: bytes) -> bytes:
        if self._cpu(arguments) is None:
            raise Malformed
        return b"OK"

    def _thread_words(self, arguments: bytes) -> bytes:
        cpu = self._cpu(arguments)
        if cpu is None:
            raise Malformed
        return _hex(f"cpu{cpu} [{self.inferior.modes()[cpu]}]".encode())

    def _current_thread(self, _arguments: bytes) -> bytes:
        return b"QC%x" % (_FIRST + self.inferior.cpu)

    def _threads(self, _arguments: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (_FIRST + cpu) for cpu in range(self.inferior.cpu_count))

    def _threads_document(self) -> str:
        """In one packet where qfThreadInfo takes two; gdb asks at every stop."""
        rows = (
            f'<thread id="{_FIRST + cpu:x}" core="{cpu}" name="cpu{cpu}">{mode}</thread>'
            for cpu, mode in enumerate(self.inferior.modes())
        )
        return f'<?xml version="1.0"?>\n<threads>{"".join(rows)}</threads>\n'

    # ---- queries

    def _query(self, arguments: bytes) -> Answer:
        name, separator, rest = _split_query(arguments)
        handler = QUERIES.get(name)
        return b"" if handler is None else handler(self, rest if separator else b"")

    def _supported(self, _features: bytes) -> bytes:
        return SUPPORTED + (b";ReverseStep+;ReverseContinue+" if self.inferior.vm.history is not None else b"")

    def _transfer(self, arguments: bytes) -> bytes:
        """qXfer:OBJECT:read:ANNEX:OFFSET,LENGTH"""
        parts = arguments.split(b":")
        if len(parts) != 4 or parts[1] != b"read":
            return b""
        offset, length = _numbers(parts[3], 2)
        if parts[0] == b"features" and parts[2] == b"target.xml":
            document = self.layout().xml().encode()
        elif parts[0] == b"memory-map" and not parts[2]:
            document = MEMORY_MAP.encode()
        elif parts[0] == b"threads" and not parts[2]:
            document = self._threads_document().encode()
        elif parts[0] in (b"features", b"memory-map", b"threads"):
            return b"E00"  # there is no such annex
        else:
            return b""
        part = document[offset : offset + min(length, _READ_MOST)]
        return (b"m" if offset + len(part) < len(document) else b"l") + escape(part)

    def _region(self, arguments: bytes) -> bytes:
        """lldb's question where it may put things: without `permissions` nothing is there."""
        start, end, rights = self.inferior.region(_number(arguments))
        size = min(end - start, (1 << 64) - 1)
        return b"start:%x;size:%x;" % (start, size) + (b"permissions:%b;" % rights.encode() if rights else b"")

    def _start_no_ack(self, _arguments: bytes) -> bytes:
        self.no_acknowledgements = True
        return b"OK"

    def _pass_signals(self, arguments: bytes) -> bytes:
        self._pass = frozenset(_number(part) for part in arguments.split(b";") if part)
        return b"OK"

    def _monitor(self, arguments: bytes) -> Said:
        try:
            text = _unhex(arguments).decode()
        except UnicodeDecodeError:
            raise Malformed from None
        word, _, rest = text.strip().partition(" ")
        own = MONITOR.get(word)
        try:
            return Said(own(self, rest.strip()) if own else self.inferior.command(text), b"OK")
        except VmfsError as error:
            self._check(error)
            return Said(f"{error}\n", error_reply(error))

    def _monitor_physical(self, argument: str) -> str:
        if argument:
            if argument not in ("on", "off"):
                raise Invalid(f"phys: {argument[:40]!r} is not on or off")
            self.inferior.physical = argument == "on"
        return f"phys {'on' if self.inferior.physical else 'off'}\n"

    def _physical_mode(self, argument: bytes) -> bytes:
        """QEMU's packets: `qqemu.PhyMemMode` asks, `Qqemu.PhyMemMode:1` sets."""
        if not argument:
            return b"%d" % self.inferior.physical
        if argument not in (b"0", b"1"):
            raise Malformed
        self.inferior.physical = argument == b"1"
        return b"OK"

    def _usual_layout(self) -> str:
        """Where none was asked for: what a gdb expects that has the ELF file which `symbols` is of."""
        return DEFAULT if self.inferior.vm.symbols.bits == 64 else "i386"

    def _set_layout(self, arguments: bytes) -> bytes:
        """vmfs's own, before gdb says anything: the words that may follow an address in the file `gdb`."""
        name, linear = parse_layout(arguments.decode("ascii", "replace").split(","))
        if self._layout is not None:
            return b"E16"
        self.layout_name, self.linear = name, linear
        return b"OK"


@functools.lru_cache(maxsize=64)
def _resumption(arguments: bytes, cpu_count: int) -> Resume:
    """vCont;ACTION[:THREAD]...: of each thread the first that is for it counts, and those without one stand still.

    A step is of one CPU, whatever the others may do: they stand still in the meantime.
    """
    if not arguments.startswith(b";"):
        raise Malformed
    actions: dict[int, Resume] = {}
    for part in arguments[1:].split(b";"):
        action, colon, text = part.partition(b":")
        thread = _thread(text) if colon else -1
        resume = _action(action)
        those = range(cpu_count) if thread in (0, -1) else (thread - _FIRST,)
        for cpu in those:
            if 0 <= cpu < cpu_count:
                actions.setdefault(cpu, resume)
    steps = [(cpu, resume) for cpu, resume in actions.items() if resume.step]
    if steps and len(steps) < max(cpu_count, 2):
        return replace(steps[0][1], cpu=steps[0][0])
    if not actions:
        raise Malformed
    if len(actions) == 1 and cpu_count > 1:
        return replace(next(iter(actions.values())), cpu=next(iter(actions)))
    return next(iter(actions.values()))


def _action(action: bytes) -> Resume:
    letter, rest = action[:1], action[1:]
    if letter in b"CS" and letter:
        _after_signal(rest)
        rest = b""
    if letter == b"r":
        start, end = _numbers(rest, 2)
        return Resume(step=True, start=start, end=end)
    if rest or letter not in (b"c", b"C", b"s", b"S"):
        raise Malformed
    return Resume(step=letter in b"sS")


def parse_layout(words: list[str]) -> tuple[str, bool]:
    """A layout's name and `linear`, in any order, neither necessary. "": the one that goes with the symbols."""
    name, linear = "", False
    for word in words:
        if word == "linear":
            linear = True
        else:
            layout(word, avx=False)
            name = word
    return name, linear


def _signal_of(exit_: Exit) -> str:
    if isinstance(exit_, exits.Shutdown):
        return _SHUTDOWN_SIGNALS[exit_.cause]
    return _EXIT_SIGNALS[type(exit_)]


def _reason(stop: Stop, kind: int, exit_: exits.Debug) -> bytes:
    """The part of a stop reply that says which of gdb's points it was."""
    if stop[0] == "break":
        return b"hwbreak:;" if kind else b"swbreak:;"
    _, address, length, access = stop
    # An access may begin before what is watched; gdb looks for a watchpoint that has the address.
    at = min(max(exit_.addr if exit_.addr is not None else address, address), address + length - 1)
    return b"%b:%x;" % ({"w": b"watch", "r": b"rwatch", "rw": b"awatch"}[access], at)


_ACCESS = {2: "w", 3: "r", 4: "rw"}


def _point(arguments: bytes) -> tuple[Stop | None, int]:
    """TYPE,ADDRESS,KIND; None for a type that there is not."""
    type_, *rest = arguments.split(b",")
    number = _number(type_)
    # Conditions and commands in agent code would follow a `;`: `ConditionalBreakpoints` is not offered.
    if len(rest) != 2:
        raise Malformed
    address, length = (_number(part) for part in rest)
    if number > 4:
        return None, number
    if number < 2:
        return ("break", address, 0, ""), number
    return ("watch", address, length, _ACCESS[number]), number


def _after_signal(arguments: bytes) -> bytes:
    """`SIG` or `SIG;ADDRESS`: the address."""
    signal, _, address = arguments.partition(b";")
    if _number(signal) > 0xFF:
        raise Malformed
    return address


def _split_query(arguments: bytes) -> tuple[bytes, bytes, bytes]:
    """A name, what ends it, and the rest: `,` or `:` or nothing."""
    found = _QUERY.match(arguments)
    return (found[1], found[2], found[3]) if found else (b"", b"", b"")


def _constant(reply: bytes) -> Callable[[Stub, bytes], bytes]:
    def handler(_stub: Stub, _arguments: bytes) -> bytes:
        return reply

    return handler


SUPPORTED = (
    b"PacketSize=%x;qXfer:features:read+;qXfer:memory-map:read+;qXfer:threads:read+;QStartNoAckMode+;QPassSignals+;"
    b"vContSupported+;hwbreak+;swbreak+;PhyMemMode+;multiprocess-" % PACKET_SIZE
)

# gdb refuses to touch what a memory map does not have, and it reads the map once. Its addresses are linear, which the
# guest maps as it likes and when it likes: any of them may be memory, and E14 says that one is not.
MEMORY_MAP = """<?xml version="1.0"?>
<!DOCTYPE memory-map PUBLIC "+//IDN gnu.org//DTD GDB Memory Map V1.0//EN" "http://sourceware.org/gdb/gdb-memory-map.dtd">
<memory-map>
<memory type="ram" start="0x0" length="0x8000000000000000"/>
<memory type="ram" start="0x8000000000000000" length="0x8000000000000000"/>
</memory-map>
"""

Handler = Callable[[Stub, bytes], Answer]

# By how a payload begins; the first that fits.
COMMANDS: Mapping[bytes, Handler] = {
    b"vCont?": _constant(b"vCont;c;C;s;S;r"),
    b"vCont": Stub._resume,
    b"vKill": Stub._v_kill,
    b"vMustReplyEmpty": _constant(b""),
    b"v": _constant(b""),
    b"qRcmd,": Stub._monitor,
    b"qThreadExtraInfo,": Stub._thread_words,
    b"q": Stub._query,
    b"Q": Stub._query,
    b"?": Stub._why,
    b"g": Stub._read_all,
    b"G": Stub._write_all,
    b"p": Stub._read_one,
    b"P": Stub._write_one,
    b"m": Stub._read_memory,
    b"x": Stub._read_binary,
    b"M": Stub._write_memory,
    b"X": Stub._write_binary,
    b"Z": Stub._insert,
    b"z": Stub._remove,
    b"bc": Stub._reverse_continue,
    b"bs": Stub._reverse_step,
    b"c": Stub._continue,
    b"C": Stub._continue_with_signal,
    b"s": Stub._step,
    b"S": Stub._step_with_signal,
    b"H": Stub._select,
    b"T": Stub._is_alive,
    b"D": Stub._detach,
    b"k": Stub._kill,
}

_BY_LETTER = {
    prefix[:1]: [row for row in COMMANDS.items() if row[0][:1] == prefix[:1]] for prefix in COMMANDS
}

# By name; q and Q alike.
QUERIES: Mapping[bytes, Handler] = {
    b"Supported": Stub._supported,
    b"Xfer": Stub._transfer,
    b"StartNoAckMode": Stub._start_no_ack,
    b"PassSignals": Stub._pass_signals,
    b"Attached": _constant(b"1"),
    b"C": Stub._current_thread,
    b"fThreadInfo": Stub._threads,
    b"sThreadInfo": _constant(b"l"),
    b"Symbol": _constant(b"OK"),
    b"MemoryRegionInfo": Stub._region,
    b"HostInfo": _constant(b"endian:little;ptrsize:8;triple:%b;" % b"x86_64-unknown-none-elf".hex().encode()),
    b"qemu.PhyMemMode": Stub._physical_mode,
    b"vmfs.Layout": Stub._set_layout,
}

# Words of `monitor` that are about the session; all others are the files'.
MONITOR: Mapping[str, Callable[[Stub, str], str]] = {
    "phys": Stub._monitor_physical,
}
