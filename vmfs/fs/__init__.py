"""The file system of a mount: `serve`."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable

import trio

from vmfs import engine
from vmfs.fs.connection import Connection, fuse_descriptors
from vmfs.fs.hooks import _fuse, pyfuse3
from vmfs.fs.inodes import Inodes
from vmfs.fs.operations import Operations
from vmfs.fs.scopes import RootScope
from vmfs.fs.tree import RootDirectory
from vmfs.host import mounts
from vmfs.host.machines import Host
from vmfs.host.settings import MountSettings
from vmfs.host.zygote import Zygote
from vmfs.memory.ram import DEFAULT_SIZE
from vmfs.words.errors import EngineFailed

log = logging.getLogger(__name__)

MAX_TASKS = 10_000  # a blocked caller takes one; without a free one the mount would stand still
ABORT_LOOK_SECONDS = 0.5
ENDING = (signal.SIGTERM, signal.SIGINT)


def serve(
    mountpoint: str,
    settings: MountSettings,
    ready: Callable[[], None],
    engines: tuple[engine.Row, ...] = engine.ENGINES,
) -> None:
    """Mount on `mountpoint` and serve until it is unmounted, or until SIGTERM or SIGINT, which unmount it.

    In the main thread. `ready` is called when the mount answers. VmfsError when it cannot be mounted. At the
    end all machines are closed.
    """
    _allow_descriptors()
    zygote = Zygote.start(engines)  # before there are threads
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        infos = engine.describe(engines)
        chosen = engine.choose(settings.engine, infos, engines)
        host = Host(zygote, chosen, settings, tuple(row.name for row in engines))
        zygote.expect(host.engine, DEFAULT_SIZE)
        trio.run(_serve, mountpoint, settings, ready, host, zygote, infos)
    finally:
        zygote.close()
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(
    mountpoint: str,
    settings: MountSettings,
    ready: Callable[[], None],
    host: Host,
    zygote: Zygote,
    infos: tuple[engine.EngineInfo, ...],
) -> None:
    inodes = Inodes()
    scope = RootScope(host, infos)
    # Where others may look in, each may make machines and remove its own, as in /tmp.
    mode = 0o1777 if settings.allow_other else 0o755
    root = RootDirectory(inodes, scope, mode, os.getuid(), os.getgid())
    began = trio.Event()
    operations = Operations(inodes, host.capacity, began)

    before = fuse_descriptors()
    where = os.path.realpath(mountpoint)
    try:
        pyfuse3.init(operations, mountpoint, _options(settings))
    except RuntimeError as error:
        raise EngineFailed(f"{mountpoint} could not be mounted: {error}") from error
    try:
        descriptor = min(fuse_descriptors() - before)  # the lane has one more of it
        scope.connection = connection = Connection(os.dup(descriptor))
        try:
            async with trio.open_nursery() as outer:
                await outer.start(zygote.serve)
                try:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(_watch_signals, root)
                        nursery.start_soon(_watch_abort, connection, root)
                        nursery.start_soon(_tell, began, ready, where, host)
                        await pyfuse3.main(max_tasks=MAX_TASKS)
                        nursery.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(shield=True):
                        await root.close()  # machines end by themselves, while the zygote tells of it
                    outer.cancel_scope.cancel()
        finally:
            connection.close()
    finally:
        _fuse.lane_stop()
        pyfuse3.close(unmount=True)


def _allow_descriptors() -> None:
    """As many as the user may have: a machine takes a handful, and the usual 1024 are 200 machines."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _options(settings: MountSettings) -> set[str]:
    options = {*pyfuse3.default_options, *settings.fuse_options}
    for name, value in (("fsname", "vmfs"), ("subtype", "vmfs")):
        if not any(option.startswith(f"{name}=") for option in options):
            options.add(f"{name}={value}")
    if settings.allow_other:
        options.add("allow_other")
    return options


async def _tell(began: trio.Event, ready: Callable[[], None], mountpoint: str, host: Host) -> None:
    await began.wait()
    for mount in mounts.table():  # not by a stat, which this server answers, and the kernel remembers
        if mount.path == mountpoint:
            host.own_device = mount.device
    log.info("mounted")
    ready()


async def _watch_signals(root: RootDirectory, task_status: trio.TaskStatus[None]) -> None:
    for number in ENDING:  # so it is again when the receiver has gone: a second ^C cuts no end short
        signal.signal(number, signal.SIG_IGN)
    with trio.open_signal_receiver(*ENDING) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            # First, and while the mount still answers: blocked callers are released.
            await root.close()
            pyfuse3.terminate()
            return


async def _watch_abort(connection: Connection, root: RootDirectory) -> None:
    """When the kernel gives the mount up, release blocked callers: the loop ends with its last task."""
    while not connection.aborted():
        await trio.sleep(ABORT_LOOK_SECONDS)
    await root.close()
