"""Fleet: cases on the workers of a Dask cluster, each with a machine of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import zstandard
from distributed import Client, Future, as_completed
from distributed.protocol import to_serialize
from distributed.scheduler import KilledWorker

from vmfs.commands import archive
from vmfs.fleet.fuzz import Campaign, Fuzzing
from vmfs.fleet.results import Raw, Result, result_of
from vmfs.fleet.store import CHUNK, Hashing, Manifest, in_turn
from vmfs.fleet.supervisor import Limits
from vmfs.fleet.worker import MEMORY, SECONDS, FleetPlugin, Work, op_of, run_cases
from vmfs.words.errors import Invalid

_BATCH_SECONDS = 1.0  # of work in a task of Dask: it takes 10 ms of processors, on a host that does other things too
_LAST_SECONDS = 0.05  # and of the last ones
_BLIND_SECONDS = 0.25  # and where nobody knows how many inputs there are: the last task may be one worker's alone
_TASK_SECONDS = 0.006  # and this for each of the cluster's threads: twice what a task takes of the scheduler (2.8 ms)
_BATCH_MOST = 10_000
_BATCH_BYTES = 4 << 20
_AHEAD = 3  # tasks of each of a worker's threads that are on their way
_SEEDS_MOST = 20
_CONNECT_SECONDS = 5.0  # to a worker, before it is asked by the scheduler
_DEATHS = 4  # of workers, after which Dask has a KilledWorker (its `allowed-failures`, and one)


@dataclass
class Template:
    """What cases start from; the file stays here as long as this does."""

    manifest: Manifest
    path: Path

    @property
    def id(self) -> str:
        return self.manifest.id


@dataclass
class _Batch:
    cases: list[tuple[int, bytes]]
    deaths: int = 0


@dataclass
class _Pace:
    """How many cases a task gets, by how long they take."""

    threads: int
    given: int | None
    seconds: float = 0
    done: int = 0

    def learn(self, raws: Sequence[Raw]) -> None:
        self.seconds += sum(raw.seconds for raw in raws)
        self.done += len(raws)

    @property
    def is_known(self) -> bool:
        return self.given is not None or self.done >= self.threads

    def size(self, left: int | None) -> int:
        """`left`: how many inputs are left, if that is known. The last tasks are short: all workers end together."""
        if self.given:
            return self.given
        if not self.is_known:
            return 1
        seconds = max(_BLIND_SECONDS if left is None else _BATCH_SECONDS, _TASK_SECONDS * self.threads)
        each = max(self.seconds / self.done, 1e-5)
        count = seconds / each
        if left is not None:
            count = min(count, max(left // (2 * self.threads), _LAST_SECONDS / each))
        return max(1, min(_BATCH_MOST, int(count)))


@dataclass
class Fleet:
    """`Fleet(client)`, of a `distributed.Client`; vmfs has to be installed where its workers are.

    `engine`: of machines of the library, instead of that of the template. `linger`, `root`, `mount_options`: as
    `FleetPlugin` has them.
    """

    client: Client
    engine: str = ""
    linger: float = 30.0
    root: str = ""
    mount_options: Sequence[str] = ()
    name: str = field(default_factory=lambda: f"vmfs-fleet-{secrets.token_hex(4)}", init=False)
    _folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="vmfs-fleet-"), repr=False
    )

    def __post_init__(self) -> None:
        self._near: set[str] = set()  # addresses of workers that this host can connect to
        self._far: set[str] = set()
        self._register()

    def _register(self) -> None:
        self.client.register_plugin(FleetPlugin(self.name, self.linger, self.root, self.mount_options))

    def close(self) -> None:
        """Take away what the workers have for it."""
        with contextlib.suppress(Exception):  # those that are gone have nothing any more
            self.client.unregister_worker_plugin(self.name)
        self._folder.cleanup()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- templates

    def template(self, what: Any) -> Template:
        """What cases start from, by its content: a `vmfs.Machine`; a machine of a mount (`vmfs.client.Vm`), as it is
        now; the path of a file of `vmfs save`, or of a saved directory. Invalid, with a sentence, for other things."""
        return self._made(lambda file: _write_template(what, file))

    def files(self, folder: str | os.PathLike[str], names: Iterable[str]) -> Template:
        """Files of a folder as a template: the function gets the path of a tar in zstd in the place of a machine."""

        def write(file: Any) -> str:
            with (
                zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed,
                tarfile.open(fileobj=packed, mode="w|") as tar,
            ):
                for each in sorted(names):
                    tar.add(os.path.join(folder, each), each, recursive=False, filter=_plain)
            return "files"

        return self._made(write)

    def _made(self, write: Callable[[Any], str]) -> Template:
        """Of what `write(file)` writes; it returns the kind."""
        fd, name = tempfile.mkstemp(dir=self._folder.name)
        try:
            with os.fdopen(fd, "wb", buffering=CHUNK) as file:
                hashing = Hashing(file)
                return Template(hashing.manifest(write(hashing)), Path(name))
        except BaseException:
            os.unlink(name)
            raise

    async def _seed(self, template: Template, address: str) -> None:
        """Send a template to a worker, whose host may have it by now. The others take it from there."""
        manifest = msgspec.msgpack.encode(template.manifest)
        missing = await self._ask(address, "missing", manifest=manifest)
        with open(template.path, "rb", buffering=0) as file:

            async def send(number: int) -> None:
                data = await asyncio.to_thread(os.pread, file.fileno(), CHUNK, number * CHUNK)
                await self._ask(address, "put", manifest=manifest, number=number, data=to_serialize(data))

            await in_turn(missing, send)

    async def _ask(self, address: str, what: str, **arguments: Any) -> Any:
        """A worker, of itself where this host can connect to it, else by the scheduler."""
        op = op_of(self.name, what)
        if address not in self._far:
            try:
                seconds = SECONDS if address in self._near else _CONNECT_SECONDS
                answer = await asyncio.wait_for(getattr(self.client.rpc(address), op)(**arguments), seconds)
                self._near.add(address)
                return answer
            except (OSError, TimeoutError):
                if address in self._near:
                    raise
                self._far.add(address)
        asked = self.client.scheduler.broadcast(msg={"op": op, **arguments}, workers=[address])
        return (await asyncio.wait_for(asked, SECONDS))[address]

    # ---- cases

    def map(
        self,
        function: Callable[[Any, Any], Any],
        inputs: Iterable[Any],
        *,
        template: Template | None = None,
        timeout: float = 60.0,
        memory: int = 0,
        disk: int = 1 << 30,
        coverage: int = 0,
        keep: str | os.PathLike[str] | None = None,
        keep_most: int = 128 << 20,
        history: int = 0,
        retries: int = 3,
        batch: int | None = None,
        progress: bool = False,
    ) -> Iterator[Result]:
        """`function(machine, input)` for each input, on a machine of its own: a Result each, as they are ready.

        The machine is as the template is: a `vmfs.Machine`, or a `vmfs.client.Vm` where the template is a saved one of
        a mount. A case may take `timeout` seconds, `memory` bytes (0: the worker's, over its threads) and `disk` bytes;
        one that takes more, raises, or ends its process has a `kind` that says so, and no other case suffers.

        `coverage`: the size of a map, as `Machine.coverage` has it. `keep`: a folder for the machines of cases that
        fail, as files of up to `keep_most` bytes. `history`: so many bytes each machine of a mount may have for its
        past, which a kept one has then, so it can be gone back in at home. `retries`: so many workers may die with a
        case before it is given up. `batch`: so many cases in a task. `progress`: a bar on stderr or in a notebook
        (tqdm, where it is installed). Inputs are taken as they are needed. Invalid for `history` without `keep`, or of
        what is no machine of a mount.
        """
        is_mounted = template is not None and template.manifest.kind == "saved"
        if history and (keep is None or not is_mounted):
            raise Invalid("a history is kept with the machine of a case that fails: it needs `keep`, and a template"
                          " that is a saved machine of a mount")  # fmt: skip
        work = Work(
            function=_packed(function),
            limits=Limits(timeout, memory, disk),
            manifest=template.manifest if template else None,
            engine=self.engine,
            coverage=coverage,
            keep_most=keep_most if keep is not None else 0,
            history=history,
        )
        return _Map(self, template, work, keep, retries, batch).run(inputs, progress)

    def fuzz(self, function: Callable[[Any, bytes], Any], seeds: Iterable[bytes], **options: Any) -> Campaign:
        """Look for inputs that end otherwise than they should: see `vmfs.fleet.fuzz.Fuzzing`."""
        return Fuzzing(**options).run(self, function, seeds)

    def bisect(
        self,
        predicate: Callable[[Any, Any], bool],
        good: int | Sequence[Any],
        bad: int | None = None,
        *,
        template: Template | None = None,
        **options: Any,
    ) -> Any:
        """The first that is bad, where what is good comes before what is bad: `predicate(machine, point)` says whether
        a point is bad. Points are numbers, from `good` (which is good) to `bad` (which is bad), as counts of
        instructions; or what a list has, as kernels, of which the last is bad. All workers look at the same time.

        Invalid where a predicate fails, or the points are not in such an order. `options` are those of `map`.
        """
        from vmfs.fleet.bisect import bisect

        def ask(points: list[Any]) -> dict[int, Result]:
            return {result.number: result for result in self.map(predicate, points, template=template, **options)}

        return bisect(ask, good, bad, self.threads())

    def threads(self) -> int:
        """How many cases the cluster runs at the same time."""
        return max(1, sum(self.client.nthreads().values()))


def _packed(function: Callable[..., Any]) -> bytes:
    """With what it uses of modules that are only here, by value: those that are not installed."""
    installed = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    here = [module for module in list(sys.modules.values()) if _is_only_here(module, installed)]
    for module in here:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(function)
    finally:
        for module in here:
            cloudpickle.unregister_pickle_by_value(module)


def _is_only_here(module: Any, installed: set[str]) -> bool:
    name, path = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if (
        not path
        or name.partition(".")[0] in ("vmfs", "__main__")
        or name in cloudpickle.list_registry_pickle_by_value()
    ):
        return False
    real = os.path.realpath(path)
    return real.endswith(".py") and not any(real.startswith(folder + os.sep) for folder in installed)


def _write_template(what: Any, file: Any) -> str:
    from vmfs import Machine
    from vmfs.client import Vm
    from vmfs.library.saved import MAGIC, write

    if isinstance(what, Machine):
        write(what, file)
        return "library"
    if isinstance(what, Vm):
        name = f"fleet-{secrets.token_hex(6)}"
        what.snapshot(name)
        try:
            archive.write(Path(what.path) / "snap" / name, file, "template")
        finally:
            what.drop(name)
        return "saved"
    path = Path(what)
    if path.is_dir():
        if not all((path / name).exists() for name in ("state", "info", "mem")):
            raise Invalid(f"{path} is no saved machine: that is a directory with state, info and mem")
        for inner in ("images", "disks"):
            if not (path / inner).is_dir():
                raise Invalid(f"{path} is no saved machine: it has no {inner}/")
        archive.write(path, file, str(path))
        return "saved"
    with open(path, "rb") as source:
        head = source.read(len(MAGIC))
        source.seek(-min(len(archive.END), os.fstat(source.fileno()).st_size), os.SEEK_END)
        kind = "library" if head == MAGIC else "saved" if source.read() == archive.END else ""
        if not kind:
            raise Invalid(f"{path} is no file of `vmfs save` or of `Machine.save`")
        source.seek(0)
        shutil.copyfileobj(source, file, CHUNK)
    return kind


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""  # the hash is of what they say
    return info


class _Map:
    """A call of `map`. Each input has one Result: tasks that a worker took with it are given out again, and a result
    that comes a second time is not looked at."""

    def __init__(
        self,
        fleet: Fleet,
        template: Template | None,
        work: Work,
        keep: Any,
        retries: int,
        batch: int | None,
    ) -> None:
        self._fleet, self._template, self._retries = fleet, template, retries
        self._keep = Path(keep) if keep is not None else None
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
        self._work = msgspec.msgpack.encode(work)
        self._resources = {MEMORY: work.limits.memory} if work.limits.memory else None
        self._given: dict[int, Any] = {}  # inputs that have no result yet
        self._sent: dict[Future, _Batch] = {}
        self._again: list[_Batch] = []
        self._pace = _Pace(fleet.threads(), batch)
        self._seeds = 0
        self._decoder = msgspec.msgpack.Decoder(list[Raw])

    def run(self, inputs: Iterable[Any], progress: bool) -> Iterator[Result]:
        numbered = enumerate(inputs)
        self._left = len(inputs) if isinstance(inputs, Sized) else None
        ready = as_completed([], raise_errors=False)
        bar = _bar(progress, inputs)
        is_seeded = self._template is None
        try:
            while True:
                if not is_seeded:
                    is_seeded = self._seed_somewhere()
                self._fill(numbered, ready)
                if not self._sent:
                    return
                future = next(ready)
                batch = self._sent.pop(future)
                for result in self._take(future, batch):
                    bar.update(1)
                    yield result
        finally:
            bar.close()
            for future in self._sent:
                future.cancel()

    # ---- giving out

    def _seed_somewhere(self) -> bool:
        addresses = list(self._fleet.client.nthreads())
        if not addresses:
            return False  # a worker that comes will say that it is missing
        self._seed(addresses[secrets.randbelow(len(addresses))])
        return True

    def _seed(self, address: str) -> None:
        self._seeds += 1
        assert self._template is not None
        with contextlib.suppress(Exception):  # the worker may go at any moment; who misses it says so again
            self._fleet.client.sync(self._fleet._seed, self._template, address)

    def _fill(self, numbered: Iterator[tuple[int, Any]], ready: Any) -> None:
        """Tasks in groups: a graph of several of them takes hardly more of Dask than one of one."""
        threads = self._pace.threads
        least, most = (_AHEAD - 1) * threads, max(2, _AHEAD * threads)
        if not self._pace.is_known:  # so they are of one case each
            least, most = threads - 1, 2 * threads
        if len(self._sent) > least:
            return
        batches: list[_Batch] = []
        while len(self._sent) + len(batches) < most:
            batch = self._again.pop() if self._again else self._next_batch(numbered)
            if batch is None:
                break
            batches.append(batch)
        if not batches:
            return
        fleet, count = self._fleet, len(batches)
        arguments = [fleet.name] * count, [self._work] * count, [batch.cases for batch in batches]
        futures = fleet.client.map(run_cases, *arguments, pure=False, resources=self._resources, retries=0)
        self._sent.update(zip(futures, batches, strict=True))
        ready.update(futures)

    def _next_batch(self, numbered: Iterator[tuple[int, Any]]) -> _Batch | None:
        cases: list[tuple[int, bytes]] = []
        size = 0
        count = self._pace.size(self._left)
        while len(cases) < count and size < _BATCH_BYTES:
            number, given = next(numbered, (-1, None))
            if number < 0:
                break
            data = cloudpickle.dumps(given)
            self._given[number] = given
            cases.append((number, data))
            size += len(data)
        if self._left is not None:
            self._left -= len(cases)
        return _Batch(cases) if cases else None

    # ---- taking in

    def _take(self, future: Future, batch: _Batch) -> Iterator[Result]:
        try:
            found = future.result(timeout=60) if future.status == "finished" else None
        except Exception:  # the worker that had it died before it was fetched
            found = None
        if found is None:
            yield from self._lost(future, batch)
        elif "again" in found:
            time.sleep(0.05)
            self._again.append(batch)
        elif "missing" in found:
            if self._seeds > _SEEDS_MOST + 10 * self._pace.threads:
                yield from self._give_up(batch, "template", "the template does not come to the workers")
                return
            self._seed(found["missing"])
            self._again.append(batch)
        else:
            raws = self._decoder.decode(found["results"])
            self._pace.learn(raws)
            numbers = {raw.number for raw in raws}
            if left := [case for case in batch.cases if case[0] not in numbers]:
                self._again.append(_Batch(left))
            for raw in raws:
                if raw.number in self._given:
                    yield self._result(raw)

    def _lost(self, future: Future, batch: _Batch) -> Iterator[Result]:
        """The workers that had the task died, or Dask failed in it, as where a network is cut: no case does that."""
        failure = None
        with contextlib.suppress(Exception):
            failure = future.exception(timeout=60) if future.status == "error" else None
        if future.status in ("cancelled", "lost"):
            self._wait_for_scheduler()
        batch.deaths += _DEATHS if isinstance(failure, KilledWorker) else 1
        if len(batch.cases) > 1:  # one of them may be the reason
            self._again.extend(_Batch([case]) for case in batch.cases)
        elif batch.deaths <= self._retries:
            self._again.append(batch)
        elif failure is None or isinstance(failure, KilledWorker):
            yield from self._give_up(batch, "worker", f"{batch.deaths} times the workers that had it died")
        else:
            yield from self._give_up(batch, "worker", f"{type(failure).__name__}: {failure}")

    def _wait_for_scheduler(self) -> None:
        end = time.monotonic() + 60
        while self._fleet.client.status != "running" and time.monotonic() < end:
            time.sleep(0.1)
        with contextlib.suppress(Exception):
            self._fleet._register()

    def _give_up(self, batch: _Batch, kind: str, sentence: str) -> Iterator[Result]:
        for number, _ in batch.cases:
            if number in self._given:
                yield self._result(Raw(number, kind=kind, error=sentence))

    def _result(self, raw: Raw) -> Result:
        saved = None
        if raw.saved and self._keep is not None:
            saved = self._keep / f"case-{raw.number}.vmfs"
            with archive.new_file(saved) as file:
                file.write(raw.saved)
        return result_of(raw, self._given.pop(raw.number), saved)


class _NoBar:
    def update(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def _bar(wanted: bool, inputs: Iterable[Any]) -> Any:
    if not wanted:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        print("vmfs.fleet: there is no bar without tqdm", file=sys.stderr)
        return _NoBar()
    return tqdm(total=len(inputs) if isinstance(inputs, Sized) else None, unit="case", smoothing=0)
