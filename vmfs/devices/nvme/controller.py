"""NVMe: a controller of NVM Express 1.4 with one namespace, the disk.

Admin commands, and what sets up queues, are done by the CPU's thread when their doorbell is written. Reads, writes and
the like are given to WORKERS threads where the machine's time is the host's, and end with an interrupt; where time
follows the instructions they are done with their doorbell, too.

Source: NVM Express 1.4, chapters 3.1 (registers), 5 (admin commands), 6 (NVM commands), 7.6 (initialisation), 4.6.1
(status).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from vmfs.devices.device import U8, U16, U32, U64, DeviceState, Port
from vmfs.devices.ide.ata import OverlayMap
from vmfs.devices.nvme import identify
from vmfs.devices.nvme.identify import EVENTS_MOST, LBA_SHIFT, MDTS, NSID, PAGE, VERSION
from vmfs.devices.nvme.queues import (
    COMMAND,
    COMPLETION,
    ENTRIES_MOST,
    Command,
    CommandFailed,
    Completion,
    CompletionState,
    Submission,
    SubmissionState,
)
from vmfs.devices.pci import MSIX, MSIX_BAR, Bar, PciDevice, PciState
from vmfs.devices.virtio.disk import AT_ONCE, SECTOR, Disk
from vmfs.devices.worker import Worker, Working
from vmfs.words.errors import Invalid

QUEUES = 8  # pairs, besides the admin queues
WORKERS = 2
_SIZE = 0x4000
_DOORBELLS = 0x1000
_CAP, _VS, _INTMS, _INTMC, _CC, _CSTS, _AQA, _ASQ, _ACQ = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30
# NVM commands, a timeout of 15 s, contiguous queues
_CAPABILITIES = 1 << 37 | 30 << 24 | 1 << 16 | ENTRIES_MOST - 1
_EN, _SHN, _CC_MASK = 1, 0xC000, 0x00FF_FFF1
_FORMS = 0x0046_0000, 0x00FF_0000  # of I/O queues' entries: 64 and 16 bytes
_UNSUPPORTED = 0x3FF0  # other commands, pages and arbitration than there are
_RDY, _CFS, _SHST_DONE = 1, 2, 8
_AQA_MASK = 0x0FFF_0FFF

# Status: type << 8 | code
OK, BAD_OPCODE, BAD_FIELD, TRANSFER_ERROR, SEQUENCE = 0x000, 0x001, 0x002, 0x004, 0x00C
BAD_NAMESPACE, BAD_PRP, WRITE_PROTECTED, OUT_OF_RANGE = 0x00B, 0x013, 0x020, 0x080
BAD_COMPLETION_QUEUE, BAD_QUEUE, BAD_QUEUE_SIZE, TOO_MANY_EVENTS = 0x100, 0x101, 0x102, 0x105
BAD_VECTOR, BAD_LOG, BAD_DELETION, NOT_SAVEABLE, NOT_CHANGEABLE = 0x108, 0x109, 0x10C, 0x10D, 0x10E
WRITE_FAULT, READ_ERROR = 0x280, 0x281
_DO_NOT_RETRY = 0x4000
_ALL = 0xFFFF_FFFF
_FUA, _DEALLOCATE = 1 << 30, 1 << 25
_RANGE = struct.Struct("<IIQ")

FLUSH, WRITE, READ, WRITE_ZEROES, MANAGEMENT = 0x00, 0x01, 0x02, 0x08, 0x09
WRITE_CACHE, NUMBER_OF_QUEUES = 0x06, 0x07
# Features and what they are at first: arbitration, power, temperatures, errors, cache, queues, coalescing, vectors,
# atomicity, events.
_FEATURES = dict.fromkeys((1, 2, 4, 5, 8, 9, 10, 11), 0) | {
    WRITE_CACHE: 1, NUMBER_OF_QUEUES: QUEUES - 1 << 16 | QUEUES - 1
}  # fmt: skip


class Job(NamedTuple):
    """Of a command: what does it, in any thread; its status where that is an OSError; the RAM that it writes."""

    do: Callable[[], None]
    failure: int
    written: list[tuple[int, int]]
    at_once: Callable[[], bool] = lambda: False  # does it where that does not wait for the host


class NvmeState(DeviceState):
    """The controller's registers; queues by their number, of which 0 is admin; `events`: the commands that wait for
    one; the rest as of virtio's disks."""

    pci: PciState
    masked: U32
    configuration: U32
    status: U8
    admin_sizes: U32
    admin_submission: U64
    admin_completion: U64
    submissions: dict[Annotated[int, msgspec.Meta(ge=0, le=QUEUES)], SubmissionState]
    completions: dict[Annotated[int, msgspec.Meta(ge=0, le=QUEUES)], CompletionState]
    features: dict[U8, U32]
    events: Annotated[tuple[U16, ...], msgspec.Meta(max_length=EVENTS_MOST)]
    size: U64
    overlay: OverlayMap


class Nvme(Working, PciDevice[NvmeState]):
    """`path` is what `info` shows."""

    TYPE = "nvme"
    STATE = NvmeState
    VENDOR, DEVICE, CLASS = 0x1234, 0x4E56, 0x010802
    EXPRESS = True
    BARS = {0: Bar("memory", _SIZE), MSIX_BAR: MSIX}
    HAS_DISK = True

    def __init__(self, board: Port, name: str, slot: int, disk: Disk, *, path: str = "", serial: str = "") -> None:
        self.disk = disk
        self.path = path
        self.serial = serial or name
        self.blocks = disk.size // SECTOR
        self.workers = [Worker(board, f"{name}-{number}") for number in range(WORKERS)]
        self._next_worker = 0
        self._at_once = 0  # bytes that may be read so until the next doorbell
        self._rings: set[int] = set()
        self._clear()
        super().__init__(board, name, slot)
        self.add_msix(QUEUES + 1)

    @property
    def boot_path(self) -> str:  # type: ignore[override]
        return f"/pci@i0cf8/pci{self.VENDOR:x},{self.DEVICE:x}@{self.slot:x}/namespace@1,0"

    def _clear(self) -> None:
        """As after power-on."""
        self.configuration = self.status = self.admin_sizes = 0
        self.admin_submission = self.admin_completion = 0
        self._stop()

    def _stop(self) -> None:
        """Without what a controller reset takes (7.3.2): all but the admin queues' registers."""
        self.masked = 0
        self.submissions: dict[int, Submission] = {}
        self.completions: dict[int, Completion] = {}
        self.features = dict(_FEATURES)
        self.events: list[int] = []
        self._rings.clear()

    # ---- registers

    def read(self, region: int, offset: int, size: int) -> int:
        if region == MSIX_BAR:
            value: int = self.function.read_msix(offset, size)
            return value
        word = self._read(offset & ~3) | self._read((offset & ~3) + 4) << 32
        return word >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read(self, offset: int) -> int:
        if offset in _WIDE:
            name, shift = _WIDE[offset]
            value: int = getattr(self, name) >> shift & _ALL
            return value
        return {
            _CAP: _CAPABILITIES & _ALL, _CAP + 4: _CAPABILITIES >> 32, _VS: VERSION, _INTMS: self.masked,
            _INTMC: self.masked, _CC: self.configuration, _CSTS: self.status, _AQA: self.admin_sizes,
        }.get(offset, 0)  # fmt: skip

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """Registers are written in words of 32 bits; 64 bits are two of them."""
        if region == MSIX_BAR:
            self.function.write_msix(offset, size, value)
            return
        if size == 8:
            self.write(region, offset, 4, value & _ALL)
            self.write(region, offset + 4, 4, value >> 32)
            return
        if size != 4 or offset & 3:
            return
        if offset >= _DOORBELLS:
            self._doorbell((offset - _DOORBELLS) // 4, value)
        elif offset in _WIDE:
            name, shift = _WIDE[offset]
            mask = 0xFFFF_F000 if not shift else _ALL
            setattr(self, name, getattr(self, name) & ~(_ALL << shift) | (value & mask) << shift)
        elif offset == _INTMS:
            self.masked |= value
            self._drive()
        elif offset == _INTMC:
            self.masked &= ~value
            self._drive()
        elif offset == _CC:
            self._configure(value)
        elif offset == _AQA:
            self.admin_sizes = value & _AQA_MASK

    def _configure(self, value: int) -> None:
        was, self.configuration = self.configuration, value & _CC_MASK
        if value & _EN and not was & _EN:
            self._enable()
        elif was & _EN and not value & _EN:
            self.settle_all()
            self._stop()
            self.status = 0
            self._drive()
        if value & _SHN and not was & _SHN:
            self.settle_all()
            self._flush_now()
            self.status |= _SHST_DONE

    def _enable(self) -> None:
        sizes = (self.admin_sizes & 0xFFF) + 1, (self.admin_sizes >> 16) + 1
        bases = self.admin_submission, self.admin_completion
        lengths = sizes[0] * COMMAND.size, sizes[1] * COMPLETION.size
        areas = zip(bases, lengths, strict=True)
        self.status = 0
        if (
            self.configuration & _UNSUPPORTED or any(not 2 <= size <= ENTRIES_MOST for size in sizes)
            or not all(self.board.is_ram(base, length) for base, length in areas)
        ):  # fmt: skip
            self._fail()
            return
        self.submissions[0] = Submission(0, SubmissionState(base=bases[0], size=sizes[0], head=0, tail=0, completion=0))
        self.completions[0] = Completion(
            CompletionState(base=bases[1], size=sizes[1], head=0, tail=0, phase=True, vector=0, interrupts=True)
        )
        self.status = _RDY

    def _fail(self) -> None:
        """A fatal status, until the host resets the controller."""
        self.counters["failures"] += 1
        self.status |= _CFS

    @property
    def _is_live(self) -> bool:
        return self.status & (_RDY | _CFS) == _RDY

    def _doorbell(self, number: int, value: int) -> None:
        queue = number >> 1
        if number & 1:
            completion = self.completions.get(queue)
            if completion is not None and value < completion.size and self._is_live:
                completion.head = value
                self._drive()
                self.go_on()
                return
        else:
            submission = self.submissions.get(queue)
            if submission is not None and value < submission.size and self._is_live:
                submission.tail = value
                self._at_once = AT_ONCE
                self._advance(submission)
                self._ring()
                return
        self.counters["bad_doorbells"] += 1

    # ---- interrupts

    def _ring(self) -> None:
        """Tell of the completions that were posted."""
        for queue in sorted(self._rings):
            completion = self.completions.get(queue)
            if completion is not None and completion.interrupts:
                self.counters["interrupts"] += 1
                self.signal(completion.vector)
        self._rings.clear()
        self._drive()

    def _drive(self) -> None:
        """INTA is of vector 0 alone, and has its mask."""
        self.set_irq(not self.masked & 1 and any(
            one.interrupts and not one.vector and one.waits for one in self.completions.values()
        ))  # fmt: skip

    # ---- commands

    def all_workers(self) -> list[Worker]:
        return self.workers

    def go_on(self) -> None:
        for submission in list(self.submissions.values()):
            self._advance(submission)
        self._ring()

    def _advance(self, submission: Submission) -> None:
        """Take what was submitted, as far as there is room for the answers."""
        board = self.board
        while submission.head != submission.tail and self._is_live and not self.is_held:
            if self.submissions.get(submission.number) is not submission:  # it was deleted meanwhile
                return
            completion = self.completions[submission.completion]
            if not completion.has_room:
                return
            if not self.is_master:
                self._fail()
                return
            data = board.dma_read(submission.base + COMMAND.size * submission.head, COMMAND.size)
            submission.head = (submission.head + 1) % submission.size
            command = Command.of(data)
            try:
                if command.flags & 0xC3:  # fused, or with SGLs
                    raise CommandFailed(BAD_FIELD)
                if submission.number:
                    self._submit(submission, completion, command)
                    continue
                result = self._admin(command)
            except CommandFailed as failure:
                self._answer(submission, completion, command, failure.status)
            else:
                if result is not None:
                    self._answer(submission, completion, command, OK, result)

    def _answer(
        self, submission: Submission, completion: Completion, command: Command, status: int, result: int = 0
    ) -> None:
        if status:
            self.counters["errors"] += 1
            status |= _DO_NOT_RETRY
        completion.post(self.board, result, submission.head, submission.number, command.id, status)
        self._rings.add(submission.completion)

    def _spans(self, command: Command, length: int) -> list[tuple[int, int]]:
        assert self.board.ram is not None  # it is mapped
        found: int | list[tuple[int, int]] = self.board.ram_chip.prps(command.prp1, command.prp2, length)
        if isinstance(found, int):
            raise CommandFailed((OK, BAD_PRP, TRANSFER_ERROR)[found])
        return found

    # ---- reads and writes

    def _submit(self, submission: Submission, completion: Completion, command: Command) -> None:
        job, board = self._job(command), self.board

        def work() -> OSError | None:
            try:
                job.do()
            except OSError as error:
                return error
            return None

        if not board.has_workers:
            self._answer(submission, completion, command, self._done(job, work()))
            return
        length = sum(size for _, size in job.written)
        if length <= self._at_once and job.at_once():
            self._at_once -= length
            self._answer(submission, completion, command, self._done(job, None))
            return
        completion.promised += 1

        def then(error: Exception | None) -> None:
            completion.promised -= 1
            self._answer(submission, completion, command, self._done(job, error))
            self._advance(submission)
            self._ring()

        self._next_worker = (self._next_worker + 1) % WORKERS
        self.workers[self._next_worker].submit(work, then)

    def _done(self, job: Job, error: Exception | None) -> int:
        """Its status."""
        if job.written:
            self.board.wrote_all(job.written)
        if error is None:
            return OK
        if not isinstance(error, OSError):
            raise error
        self.count_host_error(error)
        return job.failure

    def _job(self, command: Command) -> Job:
        make = _IO.get(command.opcode)
        if make is None:
            raise CommandFailed(BAD_OPCODE)
        if command.namespace != NSID and not (command.opcode == FLUSH and command.namespace == _ALL):
            raise CommandFailed(BAD_NAMESPACE)
        if command.opcode in (WRITE, WRITE_ZEROES, MANAGEMENT) and not self.disk.writable:
            raise CommandFailed(WRITE_PROTECTED)
        return make(self, command)

    def _check_range(self, lba: int, count: int) -> None:
        if lba + count > self.blocks:
            raise CommandFailed(OUT_OF_RANGE)

    def _views(self, found: list[tuple[int, int]]) -> list[memoryview]:
        ram = self.board.ram
        return [ram[start : start + size] for start, size in found]

    def _transfer(self, command: Command, what: str) -> list[tuple[int, int]]:
        length = command.blocks << LBA_SHIFT
        if length > PAGE << MDTS:
            raise CommandFailed(BAD_FIELD)
        self._check_range(command.lba, command.blocks)
        found = self._spans(command, length)
        self.counters[f"{what}_requests"] += 1
        self.counters[f"{what}_bytes"] += length
        return found

    def _read_blocks(self, command: Command) -> Job:
        found = self._transfer(command, "read")
        views, at = self._views(found), command.lba << LBA_SHIFT
        return Job(
            lambda: self.disk.read(at, views), READ_ERROR, found, lambda: self.disk.read_at_once(at, views)
        )

    def _is_through(self, command: Command) -> bool:
        return bool(command.dwords[2] & _FUA) or not self.features[WRITE_CACHE] & 1

    def _write_blocks(self, command: Command) -> Job:
        found = self._transfer(command, "write")
        views, at, through = self._views(found), command.lba << LBA_SHIFT, self._is_through(command)
        return Job(lambda: self.disk.write(at, views, through=through), WRITE_FAULT, [])

    def _flush(self, command: Command) -> Job:
        self.counters["flushes"] += 1
        return Job(self.disk.flush, WRITE_FAULT, [])

    def _write_zeroes(self, command: Command) -> Job:
        self._check_range(command.lba, command.blocks)
        at, length = command.lba << LBA_SHIFT, command.blocks << LBA_SHIFT
        unmaps, through = bool(command.dwords[2] & _DEALLOCATE), self._is_through(command)
        self.counters["zero_requests"] += 1
        self.counters["zero_bytes"] += length

        def do() -> None:
            self.disk.write_zeroes(at, length, unmap=unmaps)
            if through:
                self.disk.flush()

        return Job(do, WRITE_FAULT, [])

    def _manage(self, command: Command) -> Job:
        """Dataset Management: of its attributes, to deallocate."""
        count = (command.dwords[0] & 0xFF) + 1
        data = b"".join(bytes(view) for view in self._views(self._spans(command, count * _RANGE.size)))
        ranges = [(lba, blocks) for _, blocks, lba in _RANGE.iter_unpack(data)]
        for lba, blocks in ranges:
            self._check_range(lba, blocks)
        does = bool(command.dwords[1] & 4) and self.disk.can_discard
        if does:
            self.counters["discard_requests"] += 1

        def do() -> None:
            for lba, blocks in ranges:
                if does and blocks:
                    self.disk.discard(lba << LBA_SHIFT, blocks << LBA_SHIFT)

        return Job(do, WRITE_FAULT, [])

    def _flush_now(self) -> None:
        job = Job(self.disk.flush, WRITE_FAULT, [])
        if self.disk.writable:
            try:
                job.do()
            except OSError as error:
                self._done(job, error)

    # ---- admin commands

    def _admin(self, command: Command) -> int | None:
        """Its result; None where it is answered later."""
        run = _ADMIN.get(command.opcode)
        if run is None:
            raise CommandFailed(BAD_OPCODE)
        return run(self, command)

    def _give(self, command: Command, data: bytes) -> int:
        """To the host."""
        at = 0
        for start, size in self._spans(command, len(data)):
            self.board.dma_write(start, data[at : at + size])
            at += size
        return 0

    def _identify(self, command: Command) -> int:
        what, writable = command.dwords[0] & 0xFF, self.disk.writable
        discards = writable and self.disk.can_discard
        if what == 0x01:
            data = identify.controller(self.VENDOR, self.serial, writable=writable, discards=discards)
        elif what == 0x02:
            if command.namespace >= _ALL - 1:
                raise CommandFailed(BAD_NAMESPACE)
            data = identify.namespaces(command.namespace)
        elif what not in (0x00, 0x03):
            raise CommandFailed(BAD_FIELD)
        elif command.namespace != NSID:
            raise CommandFailed(BAD_NAMESPACE)
        elif what:
            data = identify.descriptors(self.serial)
        else:
            data = identify.namespace(self.blocks, writable=writable, discards=discards)
        return self._give(command, data)

    def _get_log(self, command: Command) -> int:
        page = identify.log_page(command.dwords[0] & 0xFF)
        if page is None:
            raise CommandFailed(BAD_LOG)
        length = ((command.dwords[0] >> 16 | (command.dwords[1] & 0xFFFF) << 16) + 1) * 4
        at = command.dwords[2] | command.dwords[3] << 32
        if at & 3 or at > len(page) or length > PAGE:
            raise CommandFailed(BAD_FIELD)
        return self._give(command, page[at : at + length].ljust(length, b"\0"))

    def _set_features(self, command: Command) -> int:
        number, value = command.dwords[0] & 0xFF, command.dwords[1]
        if command.dwords[0] >> 31:
            raise CommandFailed(NOT_SAVEABLE)
        if number not in self.features or number == WRITE_CACHE and not self.disk.writable:
            raise CommandFailed(BAD_FIELD)
        if number == NUMBER_OF_QUEUES:
            if self.submissions.keys() | self.completions.keys() != {0}:
                raise CommandFailed(SEQUENCE)
            if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
                raise CommandFailed(BAD_FIELD)
            return self.features[number]
        if number in (9, 10):  # of vectors and atomicity nothing can be set
            if number == 9 and value & 0xFFFF > QUEUES:
                raise CommandFailed(BAD_FIELD)
            return 0
        if number == WRITE_CACHE and not value & 1:
            self._flush_now()
        self.features[number] = value & 1 if number == WRITE_CACHE else value
        return 0

    def _get_features(self, command: Command) -> int:
        number, which = command.dwords[0] & 0xFF, command.dwords[0] >> 8 & 7
        if number not in self.features or which > 3 or number == WRITE_CACHE and not self.disk.writable:
            raise CommandFailed(BAD_FIELD)
        if which == 3:  # what it can: only to be changed, where it can be
            return 0 if number in (NUMBER_OF_QUEUES, 9, 10) else 4
        if number == 9:
            return command.dwords[1] & 0xFFFF
        return self.features[number] if which == 0 else _FEATURES[number]

    def _queue_of(self, command: Command, taken: Mapping[int, Any], entry: int) -> tuple[int, int]:
        """The number and the size of a queue that is to be made."""
        number, size = command.dwords[0] & 0xFFFF, (command.dwords[0] >> 16) + 1
        if not 1 <= number <= QUEUES or number in taken:
            raise CommandFailed(BAD_QUEUE)
        if not 2 <= size <= ENTRIES_MOST:
            raise CommandFailed(BAD_QUEUE_SIZE)
        is_contiguous = command.dwords[1] & 1
        if not is_contiguous or command.prp1 % PAGE or not self.board.is_ram(command.prp1, size * entry):
            raise CommandFailed(BAD_FIELD)
        if self.configuration & _FORMS[1] != _FORMS[0]:
            raise CommandFailed(BAD_QUEUE_SIZE)
        return number, size

    def _create_completion(self, command: Command) -> int:
        number, size = self._queue_of(command, self.completions, COMPLETION.size)
        vector = command.dwords[1] >> 16
        if vector > QUEUES:
            raise CommandFailed(BAD_VECTOR)
        self.board.dma_write(command.prp1, bytes(size * COMPLETION.size))  # no phase but the first one's
        self.completions[number] = Completion(CompletionState(
            base=command.prp1, size=size, head=0, tail=0, phase=True, vector=vector,
            interrupts=bool(command.dwords[1] & 2),
        ))  # fmt: skip
        return 0

    def _create_submission(self, command: Command) -> int:
        number, size = self._queue_of(command, self.submissions, COMMAND.size)
        completion = command.dwords[1] >> 16
        if not completion or completion not in self.completions:
            raise CommandFailed(BAD_COMPLETION_QUEUE)
        self.submissions[number] = Submission(
            number, SubmissionState(base=command.prp1, size=size, head=0, tail=0, completion=completion)
        )
        return 0

    def _delete_submission(self, command: Command) -> int:
        number = command.dwords[0] & 0xFFFF
        if not number or number not in self.submissions:
            raise CommandFailed(BAD_QUEUE)
        self.settle_all()  # what it has taken is answered first
        del self.submissions[number]
        return 0

    def _delete_completion(self, command: Command) -> int:
        number = command.dwords[0] & 0xFFFF
        if not number or number not in self.completions:
            raise CommandFailed(BAD_QUEUE)
        if any(one.completion == number for one in self.submissions.values()):
            raise CommandFailed(BAD_DELETION)
        del self.completions[number]
        self._rings.discard(number)
        return 0

    def _abort(self, command: Command) -> int:
        return 1  # what is under way is not held up

    def _await_event(self, command: Command) -> None:
        if len(self.events) == EVENTS_MOST:
            raise CommandFailed(TOO_MANY_EVENTS)
        self.events.append(command.id)

    # ---- life

    def reset(self) -> None:
        super().reset()
        self.settle_all()
        self._clear()
        self._drive()

    def save(self) -> NvmeState:
        return NvmeState(
            pci=self.save_pci(),
            **{name: getattr(self, name) for name in _PLAIN},
            submissions={number: one.save() for number, one in self.submissions.items()},
            completions={number: one.save() for number, one in self.completions.items()},
            features=dict(self.features),
            events=tuple(self.events),
            size=self.disk.size,
            overlay=self.disk.save_map(),
        )

    def check(self, state: NvmeState) -> None:
        self.check_pci(state.pci)
        if state.size != self.disk.size:
            raise Invalid(f"{self.name}: the disk has {self.disk.size} bytes, and had {state.size}")
        is_live = bool(state.status & _RDY)
        is_right = (
            not state.configuration & ~_CC_MASK and not state.status & ~(_RDY | _CFS | _SHST_DONE)
            and not state.admin_sizes & ~_AQA_MASK and not (state.admin_submission | state.admin_completion) % PAGE
            and state.features.keys() == _FEATURES.keys() and is_live == (0 in state.submissions)
            and (is_live or not state.submissions | state.completions) and is_live == (0 in state.completions)
        )  # fmt: skip
        if not is_right:
            raise Invalid(f"{self.name}: registers that it cannot have")
        for entry, queues in ((COMMAND.size, state.submissions), (COMPLETION.size, state.completions)):
            for one in queues.values():
                if one.base % PAGE or max(one.head, one.tail) >= one.size:
                    raise Invalid(f"{self.name}: a queue that it cannot have")
                if not self.board.is_ram(one.base, one.size * entry):
                    raise Invalid(f"{self.name}: a queue that is not all RAM")
        for number, one in state.submissions.items():
            if one.completion not in state.completions or bool(number) != bool(one.completion):
                raise Invalid(f"{self.name}: a queue without one for its answers")
        if any(one.vector > QUEUES for one in state.completions.values()):
            raise Invalid(f"{self.name}: it has {QUEUES + 1} vectors")
        self.disk.check_map(state.overlay)

    def load(self, state: NvmeState) -> None:
        for name in _PLAIN:
            setattr(self, name, getattr(state, name))
        self.submissions = {number: Submission(number, one) for number, one in state.submissions.items()}
        self.completions = {number: Completion(one) for number, one in state.completions.items()}
        self.features, self.events = dict(state.features), list(state.events)
        self._rings.clear()
        self.disk.load_map(state.overlay)
        self.load_pci(state.pci)

    def describe(self) -> dict[str, str]:
        return {
            **super().describe(), "path": self.path, "mode": self.disk.mode, "size": str(self.disk.size),
            "serial": self.serial, "discard": "yes" if self.disk.can_discard else "no",
            "queues": str(max(len(self.submissions) - 1, 0)),
        }  # fmt: skip

    def close(self) -> bool:
        """Whether nothing is under way any more. Else the last worker closes the disk."""
        left = [worker for worker in self.workers if not worker.close()]
        if not left:
            self.disk.close()
            return True
        waiting = len(left)

        def ended() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                self.disk.close()

        for worker in left:
            worker.at_end(ended)
        return False


_PLAIN = "masked", "configuration", "status", "admin_sizes", "admin_submission", "admin_completion"
_WIDE = {
    _ASQ: ("admin_submission", 0), _ASQ + 4: ("admin_submission", 32),
    _ACQ: ("admin_completion", 0), _ACQ + 4: ("admin_completion", 32),
}  # fmt: skip
_IO: Mapping[int, Callable[[Nvme, Command], Job]] = {
    FLUSH: Nvme._flush,
    WRITE: Nvme._write_blocks,
    READ: Nvme._read_blocks,
    WRITE_ZEROES: Nvme._write_zeroes,
    MANAGEMENT: Nvme._manage,
}
_ADMIN: Mapping[int, Callable[[Nvme, Command], int | None]] = {
    0x00: Nvme._delete_submission,
    0x01: Nvme._create_submission,
    0x02: Nvme._get_log,
    0x04: Nvme._delete_completion,
    0x05: Nvme._create_completion,
    0x06: Nvme._identify,
    0x08: Nvme._abort,
    0x09: Nvme._set_features,
    0x0A: Nvme._get_features,
    0x0C: Nvme._await_event,
}
