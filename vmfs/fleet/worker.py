"""What a Dask worker of a fleet has: templates, a mount, runners. All of it goes with the worker, however that ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import random
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from distributed import WorkerPlugin
from distributed.protocol import to_serialize

from vmfs.client import Vm
from vmfs.client.mounting import MountFailed, private_mount, removed_in_any_case
from vmfs.fleet.results import Raw
from vmfs.fleet.runner import Case, Job, describe_mounted, keep_mounted
from vmfs.fleet.store import CHUNK, Entry, Manifest, Part, Store, in_turn, read_chunk
from vmfs.fleet.supervisor import Limits, Supervisor
from vmfs.fleet.unpacked import Unpacked
from vmfs.words.errors import Invalid, VmfsError

MEMORY = "vmfs-memory"  # the resource: bytes
SECONDS = 60.0  # for an answer of another process of the cluster
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_RESULTS_MOST = 64 << 20  # bytes of a task's results, after which the other cases of it are for another task


class Work(msgspec.Struct):
    """What cases have in common, as it comes to a worker."""

    function: bytes
    limits: Limits
    manifest: Manifest | None = None
    engine: str = ""
    coverage: int = 0
    keep_most: int = 0
    history: int = 0


def op_of(fleet: str, what: str) -> str:
    """The name of what a worker does when it is asked."""
    return f"{fleet}_{what}".replace("-", "_")


def reuse_memory(does: bool) -> None:
    """Whether malloc keeps the memory that pieces of a template lie in, for the next ones. With the
    MALLOC_TRIM_THRESHOLD_ that Dask sets for its workers each piece has new pages of the kernel, which takes half of
    the processor time of receiving it."""
    with contextlib.suppress(KeyError, ValueError, OSError, AttributeError):  # it is not set; that is no glibc
        trim = int(os.environ["MALLOC_TRIM_THRESHOLD_"])
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 8 * CHUNK if does else 128 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * CHUNK if does else trim)
        if not does:
            libc.malloc_trim(0)


class Missing(Exception):
    """No worker that answers has the template."""


class FleetPlugin(WorkerPlugin):
    def __init__(self, name: str, linger: float = 30.0, root: str = "", mount_options: Sequence[str] = ()) -> None:
        """`name`: of the fleet, a word that no other one has. `linger`: for so many seconds a template stays on a host
        whose last worker was killed; one that is started in its place finds it. `root`: the folder for templates.
        `mount_options`: of `vmfs mount`."""
        self.name, self.linger, self.root, self.mount_options = name, linger, root, tuple(mount_options)

    # ---- life

    async def setup(self, worker: Any) -> None:
        await asyncio.to_thread(self._set_up, worker)
        worker.handlers.update(self._handlers())
        if worker.memory_manager.memory_limit:
            await worker.set_resources(**{MEMORY: worker.memory_manager.memory_limit})

    def _handlers(self) -> dict[str, Any]:
        made = {"missing": self._missing, "put": self._put, "chunk": self._chunk}
        return {self._op(what): handler for what, handler in made.items()}

    def _set_up(self, worker: Any) -> None:
        self._worker = worker
        self._closing = contextlib.ExitStack()
        self._store = Store(Path(self.root) if self.root else None)
        self._store.sweep(self.linger)
        self._token = secrets.token_hex(8)
        self.work = self._store.root / f"work-{os.getpid()}-{secrets.token_hex(4)}"
        self._stay = self._closing.enter_context(removed_in_any_case(self._last_command()))
        self.work.mkdir(mode=0o700)
        self._mount: Path | None = None
        self._machines: dict[str, Path] = {}
        self._seeds: dict[str, Part] = {}
        self._unpacked: dict[str, Unpacked] = {}
        self._lock = threading.RLock()
        self._idle: list[tuple[bytes, Supervisor]] = []
        self._busy: set[Supervisor] = set()
        self.is_closed = False

    def _last_command(self) -> str:
        """What is done after it was killed. A case that lets no thread of its runner run does not see that itself."""
        root, work = shlex.quote(str(self._store.root)), shlex.quote(str(self.work))
        python = f"PYTHONPATH={shlex.quote(os.pathsep.join(sys.path))} {shlex.quote(sys.executable)} -c"
        end = f"from vmfs.fleet.processes import end_marked; end_marked({self._token!r})"
        sweep = (
            "import sys; from vmfs.fleet.store import Store; from pathlib import Path; Store(Path(sys.argv[1])).sweep()"
        )
        return (
            f"{python} {shlex.quote(end)}; rm -rf -- {work}; sleep {self.linger:g};"
            f" {python} {shlex.quote(sweep)} {root}; rmdir -- {root}"
        )

    async def teardown(self, worker: Any) -> None:
        for name in self._handlers():
            worker.handlers.pop(name, None)
        await asyncio.to_thread(self._tear_down)

    def _tear_down(self) -> None:
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            runners = [runner for _, runner in self._idle] + list(self._busy)
            self._idle.clear()
        for runner in runners:
            runner.close()
        for unpacked in self._unpacked.values():
            unpacked.close()
        self._store.close()
        self._store.sweep()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._store.root.rmdir()
        self._stay()
        self._closing.close()

    # ---- templates: what is asked of it by the client and by other workers, and the scheduler hands on

    async def _missing(self, manifest: bytes) -> list[int]:
        """The chunks that the client is to send; what another worker of the host has fetched is here."""
        return await asyncio.to_thread(self._begin_seed, msgspec.msgpack.decode(manifest, type=Manifest))

    def _begin_seed(self, manifest: Manifest) -> list[int]:
        if self._store.use(manifest).is_whole:
            self._say_whole(manifest)
            return []
        with self._lock:
            part = self._seeds.get(manifest.id)
            if part is None:
                reuse_memory(True)
                path = self.work / f"seed-{manifest.id}"
                part = self._seeds[manifest.id] = self._store.use(manifest).part(path)
            return sorted(part.missing)

    async def _put(self, manifest: bytes, number: int, data: Any) -> None:
        """A chunk from the client."""
        decoded = msgspec.msgpack.decode(manifest, type=Manifest)
        await asyncio.to_thread(self._take_seed, decoded, number, data)

    def _take_seed(self, manifest: Manifest, number: int, data: Any) -> None:
        part = self._seeds.get(manifest.id)
        if part is None:  # it is whole by now
            return
        part.put(number, data)
        with self._lock:
            if part.missing or self._seeds.pop(manifest.id, None) is None:
                return
            if not self._seeds:
                reuse_memory(False)
        entry = self._store.use(manifest)
        with entry.writing() as is_needed:
            if is_needed:
                entry.take(part)
            part.close()
        self._say_whole(manifest)

    async def _chunk(self, id: str, number: int) -> Any:
        """For another worker: a chunk of a template that is here."""
        path = self._store.find(id)
        return None if path is None else to_serialize(await asyncio.to_thread(read_chunk, path, number))

    def _sync(self, awaitable: Any, seconds: float | None = SECONDS) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, self._worker.loop.asyncio_loop).result(seconds)

    def template(self, manifest: Manifest) -> Entry:
        """It is there, after it was fetched, once a host. Missing where nobody has it."""
        entry = self._store.use(manifest)
        if not entry.is_whole:
            with entry.writing() as is_needed:
                if is_needed:
                    self._fetch(entry)
            self._say_whole(manifest)
        return entry

    def _say_whole(self, manifest: Manifest) -> None:
        keys = [self.name, manifest.id, self._worker.address]
        self._sync(self._worker.scheduler.set_metadata(keys=keys, value=True))

    def _fetch(self, entry: Entry) -> None:
        # The scheduler's metadata: by fleet and template, the addresses of workers that have it, or had it.
        found = self._sync(self._worker.scheduler.get_metadata(keys=[self.name, entry.manifest.id], default={}))
        there = self._sync(self._worker.scheduler.ncores(workers=list(found))) if found else {}
        addresses = [address for address in there if address != self._worker.address]
        random.shuffle(addresses)
        reuse_memory(True)
        try:
            for address in addresses:
                part = entry.part()
                try:
                    with contextlib.suppress(Missing, Invalid, OSError, TimeoutError):
                        self._sync(self._fetch_from(address, part, entry.manifest), None)
                        entry.take(part)
                        return
                finally:
                    part.close()
        finally:
            reuse_memory(False)
        raise Missing(entry.manifest.id)

    async def _fetch_from(self, address: str, part: Part, manifest: Manifest) -> None:
        async def fetch(number: int) -> None:
            asked = getattr(self._worker.rpc(address), self._op("chunk"))(id=manifest.id, number=number)
            data = await asyncio.wait_for(asked, SECONDS)
            if data is None:
                raise Missing(manifest.id)
            await asyncio.to_thread(part.put, number, data)

        await in_turn(sorted(part.missing), fetch)

    def _op(self, what: str) -> str:
        return op_of(self.name, what)

    def _unpack(self, manifest: Manifest) -> Unpacked:
        entry = self.template(manifest)
        with self._lock:
            found = self._unpacked.get(manifest.id)
            if found is None:
                found = self._unpacked[manifest.id] = Unpacked.of(entry)
            return found

    # ---- a mount, for machines that are PCs

    def _machine(self, manifest: Manifest) -> Path:
        """The machine of this worker's mount that has the template as its snapshot `start`."""
        from vmfs.commands import archive

        unpacked = self._unpack(manifest)
        with self._lock:
            if self._mount is None:
                self._mount = self._closing.enter_context(private_mount(self.mount_options, prefix="vmfs-fleet-"))
            machine = self._machines.get(manifest.id)
            if machine is None:
                machine = self._mount / f"template-{manifest.id[:16]}"
                archive.come_in(machine, unpacked.fill, keep="start")
                self._machines[manifest.id] = machine
            return machine

    def _clean(self, prefix: str, work: Work, raw: Raw) -> None:
        """The machines of a runner that was killed: say what they were, and remove them."""
        if self._mount is None:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self._mount):
                if name.startswith(prefix + "-"):
                    path = self._mount / name
                    with contextlib.suppress(OSError), Vm(path) as vm:
                        if raw.kind:
                            vm.pause()
                            describe_mounted(vm, raw, 0)
                        if raw.kind and work.keep_most:
                            keep_mounted(str(path), raw, work.keep_most, bool(work.history))
                    with contextlib.suppress(OSError):
                        os.rmdir(path)

    # ---- cases

    def run(self, data: bytes, cases: Sequence[Case]) -> list[Raw]:
        """In turn, for a Work that is packed; not all of them where what comes of them is long. Missing where the
        template is not to be had."""
        runner = self._idle_runner(data) or self._new_runner(msgspec.msgpack.decode(data, type=Work))
        with self._lock:
            self._busy.add(runner)
        try:
            results: list[Raw] = []
            size = 0
            for raw in runner.run(cases):
                raw.worker = self._worker.address
                results.append(raw)
                size += len(raw.value) + len(raw.saved) + len(raw.coverage)
                if size > _RESULTS_MOST and len(results) < len(cases):
                    runner.close()  # it has begun the next one
                    break
        except BaseException:
            runner.close()
            raise
        finally:
            with self._lock:
                self._busy.discard(runner)
        with self._lock:
            if not self.is_closed:
                self._idle.append((data, runner))
                return results
        runner.close()
        return results

    def _idle_runner(self, data: bytes) -> Supervisor | None:
        """One of that work; those of other work are ended."""
        with self._lock:
            others = [runner for its, runner in self._idle if its != data]
            ours = [runner for its, runner in self._idle if its == data]
            found = ours.pop() if ours else None
            self._idle = [(data, each) for each in ours]
        for each in others:
            each.close()
        return found

    def _new_runner(self, work: Work) -> Supervisor:
        prefix = f"case-{secrets.token_hex(4)}"
        job = Job(
            work.function,
            engine=work.engine,
            coverage=work.coverage,
            keep_most=work.keep_most,
            history=work.history,
            prefix=prefix,
            file_most=work.limits.disk,
        )
        limits, memory = work.limits, ()
        if work.manifest is not None:
            job.kind = work.manifest.kind
            if job.kind == "saved":
                job.path = str(self._machine(work.manifest))
            elif job.kind == "library":
                unpacked = self._unpack(work.manifest)
                memory = tuple(unpacked.memory[str(number)] for number in range(len(unpacked.memory)))
                job.head, job.memory = unpacked.head, list(memory)
            else:
                job.path = str(self.template(work.manifest).path)
        if not limits.memory and (most := self._worker.memory_manager.memory_limit):
            limits = msgspec.structs.replace(limits, memory=int(most) // self._worker.state.nthreads)
        clean = functools.partial(self._clean, prefix, work)
        return Supervisor(job, limits, self.work, token=self._token, memory=memory, clean=clean)


def run_cases(fleet: str, data: bytes, inputs: Sequence[tuple[int, bytes]]) -> dict[str, Any]:
    """A task of Dask: cases of a map, for a Work that is packed. The results; or {"missing": address}, where the client
    has to send the template to this worker first; or {"again": True}, of a worker that goes."""
    from distributed import get_worker

    worker = get_worker()
    plugin = worker.plugins.get(fleet)
    if plugin is None:  # the worker begins, or ends
        return {"again": True}
    try:
        results = plugin.run(data, [Case(number, each) for number, each in inputs])
    except Missing:
        return {"missing": worker.address}
    except MountFailed as failure:
        results = _all_failed(inputs, f"this worker has no mount, which a saved machine needs: {failure}", worker)
    except (VmfsError, OSError) as failure:
        results = _all_failed(inputs, f"the template cannot be used here: {failure}", worker)
    if plugin.is_closed:  # it took its runners away under the cases
        return {"again": True}
    return {"results": msgspec.msgpack.encode(results)}


def _all_failed(inputs: Sequence[tuple[int, bytes]], sentence: str, worker: Any) -> list[Raw]:
    return [Raw(number, kind="template", error=sentence, worker=worker.address) for number, _ in inputs]
