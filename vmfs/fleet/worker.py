"""What a Dask worker of a fleet has: templates, a mount, runners. All of it goes with the worker, however that ends."""

from __future__ import annotations

import asyncio
import contextlib
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

from vmfs.client import Vm
from vmfs.client.mounting import MountFailed, private_mount, removed_in_any_case
from vmfs.fleet.results import Raw
from vmfs.fleet.runner import Case, Job, describe_mounted, save_mounted
from vmfs.fleet.store import Entry, Manifest, Store, read_chunk
from vmfs.fleet.supervisor import Limits, Supervisor
from vmfs.words.errors import Invalid, VmfsError

MEMORY = "vmfs-memory"  # the resource: bytes
_FETCH_SECONDS = 60.0


class Work(msgspec.Struct):
    """What cases have in common, as it comes to a worker."""

    function: bytes
    limits: Limits
    manifest: Manifest | None = None
    engine: str = ""
    coverage: int = 0
    keeps: bool = False


class Missing(Exception):
    """No worker that answers has the template."""


class FleetPlugin(WorkerPlugin):
    def __init__(self, name: str, linger: float = 30.0, root: str = "", mount_options: Sequence[str] = ()) -> None:
        """`name`: of the fleet, a word that no other one has. `linger`: for so many seconds a template stays on a host
        whose last worker was killed; one that is started in its place finds it. `root`: the folder for templates.
        `mount_options`: of `vmfs mount`."""
        self.name, self.linger, self.root, self.mount_options = name, linger, root, tuple(mount_options)
        self._chunk_op = f"{name}-chunk".replace("-", "_")

    # ---- life

    async def setup(self, worker: Any) -> None:
        await asyncio.to_thread(self._set_up, worker)
        worker.handlers[self._chunk_op] = self._chunk
        if worker.memory_manager.memory_limit:
            await worker.set_resources(**{MEMORY: worker.memory_manager.memory_limit})

    def _set_up(self, worker: Any) -> None:
        self._worker = worker
        self._closing = contextlib.ExitStack()
        self._store = Store(Path(self.root) if self.root else None)
        self._store.sweep(self.linger)
        self.work = self._store.root / f"work-{os.getpid()}-{secrets.token_hex(4)}"
        self._stay = self._closing.enter_context(removed_in_any_case(self._last_command()))
        self.work.mkdir(mode=0o700)
        self._mount: Path | None = None
        self._machines: dict[str, Path] = {}
        self._lock = threading.RLock()
        self._idle: list[tuple[bytes, Supervisor]] = []
        self._busy: set[Supervisor] = set()
        self.is_closed = False

    def _last_command(self) -> str:
        root = shlex.quote(str(self._store.root))
        sweep = (
            "import sys; from vmfs.fleet.store import Store; from pathlib import Path; Store(Path(sys.argv[1])).sweep()"
        )
        path = shlex.quote(os.pathsep.join(sys.path))
        return (
            f"rm -rf -- {shlex.quote(str(self.work))}; sleep {self.linger:g};"
            f" PYTHONPATH={path} {shlex.quote(sys.executable)} -c {shlex.quote(sweep)} {root}; rmdir -- {root}"
        )

    async def teardown(self, worker: Any) -> None:
        worker.handlers.pop(self._chunk_op, None)
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
        self._store.close()
        self._store.sweep()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._store.root.rmdir()
        self._stay()
        self._closing.close()

    # ---- templates

    async def _chunk(self, id: str, number: int) -> bytes | None:
        """For another worker: a chunk of a template that is here."""
        path = self._store.find(id)
        return None if path is None else await asyncio.to_thread(read_chunk, path, number)

    def _sync(self, awaitable: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(awaitable, self._worker.loop.asyncio_loop).result(_FETCH_SECONDS)

    def template(self, manifest: Manifest) -> Path:
        """Where it is, after it was fetched, once a host. Missing where nobody has it."""
        entry = self._store.use(manifest)
        if not entry.is_whole:
            with entry.writing() as is_needed:
                if is_needed:
                    self._fetch(entry)
            self.say_whole(manifest)
        return entry.path

    def say_whole(self, manifest: Manifest) -> None:
        keys = [self.name, manifest.id, self._worker.address]
        self._sync(self._worker.scheduler.set_metadata(keys=keys, value=True))

    def _fetch(self, entry: Entry) -> None:
        # The scheduler's metadata: by fleet and template, the addresses of workers that have it, or had it.
        found = self._sync(self._worker.scheduler.get_metadata(keys=[self.name, entry.manifest.id], default={}))
        there = self._sync(self._worker.scheduler.ncores(workers=list(found))) if found else {}
        addresses = [address for address in there if address != self._worker.address]
        random.shuffle(addresses)
        for address in addresses:
            with contextlib.suppress(Missing, Invalid, OSError, TimeoutError):
                entry.write(lambda number, address=address: self._fetch_chunk(address, entry.manifest.id, number))
                return
        raise Missing(entry.manifest.id)

    def _fetch_chunk(self, address: str, id: str, number: int) -> bytes:
        async def ask() -> bytes | None:
            return await getattr(self._worker.rpc(address), self._chunk_op)(id=id, number=number)

        data = self._sync(ask())
        if not isinstance(data, bytes):
            raise Missing(id)
        return data

    def seed(self, manifest: Manifest, number: int, data: bytes) -> None:
        """Chunk `number` from the client, which sends them in turn."""
        entry = self._store.use(manifest)
        folder = self.work / f"seed-{manifest.id}"
        folder.mkdir(exist_ok=True)
        (folder / str(number)).write_bytes(data)
        if number + 1 == len(manifest.chunks):
            try:
                with entry.writing() as is_needed:
                    if is_needed:
                        entry.write(lambda each: (folder / str(each)).read_bytes())
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.say_whole(manifest)

    def has(self, manifest: Manifest) -> bool:
        """Whether it is here; what another worker of the host has fetched is."""
        is_whole = self._store.use(manifest).is_whole
        if is_whole:
            self.say_whole(manifest)
        return is_whole

    # ---- a mount, for machines that are PCs

    def _machine(self, manifest: Manifest, path: Path) -> Path:
        """The machine of this worker's mount that has the template as its snapshot `start`."""
        from vmfs.commands import archive

        with self._lock:
            if self._mount is None:
                self._mount = self._closing.enter_context(private_mount(self.mount_options, prefix="vmfs-fleet-"))
            machine = self._machines.get(manifest.id)
            if machine is None:
                machine = self._mount / f"template-{manifest.id[:16]}"
                with open(path, "rb") as source:
                    archive.load(machine, source, str(path), manifest.size, keep="start")
                self._machines[manifest.id] = machine
            return machine

    def _clean(self, prefix: str, keeps: bool, raw: Raw) -> None:
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
                        if raw.kind and keeps:
                            raw.saved = save_mounted(str(path))
                    with contextlib.suppress(OSError):
                        os.rmdir(path)

    # ---- cases

    def run(self, data: bytes, cases: Sequence[Case]) -> list[Raw]:
        """All of them, in turn, for a Work that is packed. Missing where the template is not to be had."""
        runner = self._runner(data)
        try:
            results = []
            for raw in runner.run(cases):
                raw.worker = self._worker.address
                results.append(raw)
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

    def _runner(self, data: bytes) -> Supervisor:
        """One that is idle, or a new one in the place of those of other work."""
        with self._lock:
            others = [runner for its, runner in self._idle if its != data]
            ours = [runner for its, runner in self._idle if its == data]
            runner = ours.pop() if ours else None
            self._idle = [(data, each) for each in ours]
            if runner is not None:
                self._busy.add(runner)
        for each in others:
            each.close()
        if runner is None:
            runner = self._new_runner(msgspec.msgpack.decode(data, type=Work))
            with self._lock:
                self._busy.add(runner)
        return runner

    def _new_runner(self, work: Work) -> Supervisor:
        prefix = f"case-{secrets.token_hex(4)}"
        job = Job(
            work.function,
            engine=work.engine,
            coverage=work.coverage,
            keeps=work.keeps,
            prefix=prefix,
            file_most=work.limits.disk,
        )
        limits = work.limits
        if work.manifest is not None:
            job.kind = work.manifest.kind
            path = self.template(work.manifest)
            if job.kind == "saved":
                path = self._machine(work.manifest, path)
            job.path = str(path)
        if not limits.memory and (most := self._worker.memory_manager.memory_limit):
            limits = msgspec.structs.replace(limits, memory=int(most) // self._worker.state.nthreads)
        return Supervisor(job, limits, self.work, clean=functools.partial(self._clean, prefix, work.keeps))


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


def seed_chunk(fleet: str, manifest: bytes, number: int, data: bytes) -> None:
    """A task of Dask, on a worker that is named."""
    from distributed import get_worker

    get_worker().plugins[fleet].seed(msgspec.msgpack.decode(manifest, type=Manifest), number, data)


def has_template(fleet: str, manifest: bytes) -> bool:
    """A task of Dask, on a worker that is named."""
    from distributed import get_worker

    return get_worker().plugins[fleet].has(msgspec.msgpack.decode(manifest, type=Manifest))
