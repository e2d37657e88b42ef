"""A fleet on this host: what it takes from a case, how two workers go beside each other, and templates.

The peer is the same cases by hand: one machine, set back before each, in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import Result
from vmfs import Machine

CODE = 0x1000
COUNT = bytes.fromhex("48ffc0 48ffc9 75f8 f4")  # l: inc rax; dec rcx; jne l; hlt
TEMPLATE_MIB = 512


def turns(machine: Any, count: int) -> int:
    """A case: so many turns of a loop."""
    machine.rcx = count
    machine.run()
    return machine.rax


def made() -> Machine:
    machine = Machine(memory={CODE: COUNT})
    machine.rip = CODE
    return machine


def turns_for(seconds: float) -> int:
    """How many turns take so long."""
    with made() as machine:
        start, count = machine.snapshot(), 10_000_000
        machine.rcx = 1000
        machine.run()
        machine.restore(start)
        began = time.perf_counter()
        turns(machine, count)
        return max(1, int(count * seconds / (time.perf_counter() - began)))


def by_hand(count: int, cases: int) -> float:
    """Seconds for the cases in this process."""
    with made() as machine:
        start = machine.snapshot()
        began = time.perf_counter()
        for _ in range(cases):
            turns(machine, count)
            machine.restore(start)
        return time.perf_counter() - began


@contextmanager
def fleets(workers: int) -> Iterator[Any]:
    from distributed import Client

    from vmfs.fleet import Fleet, local_cluster

    with (
        tempfile.TemporaryDirectory() as root,
        local_cluster(host="127.0.0.1", n_workers=workers, threads_per_worker=1, memory_limit="4GiB") as cluster,
        Client(cluster) as client,
        Fleet(client, linger=0, root=os.path.join(root, "store")) as fleet,
    ):
        yield fleet


def by_fleet(fleet: Any, template: Any, count: int, cases: int) -> float:
    began = time.perf_counter()
    results = list(fleet.map(turns, [count] * cases, template=template))
    took = time.perf_counter() - began
    assert len(results) == cases and all(result.value == count for result in results), results[0]
    return took


def results() -> list[Result]:
    if importlib.util.find_spec("distributed") is None:
        return []
    found = []
    short, middle, long = turns_for(0.001), turns_for(0.02), turns_for(0.2)
    with fleets(1) as fleet, made() as machine:
        template = fleet.template(machine)
        by_fleet(fleet, template, short, 2000)
        ours, hand = both(fleet, template, short, 4000)
        found.append(Result("cases of 1 ms, one worker", "cases/s", 4000 / ours, "by hand", 4000 / hand, ">= 0.8"))
        by_fleet(fleet, template, middle, 100)
        ours, hand = both(fleet, template, middle, 200)
        over = (ours - hand) / 200
        found.append(
            Result(
                "a case of 20 ms takes more by", "ms", over * 1000, "by hand, the whole", hand / 200 * 1000, "<= 5 ms"
            )
        )
    with fleets(1) as small, fleets(2) as large, made() as machine:
        kinds = [(fleet, fleet.template(machine)) for fleet in (small, large)]
        for fleet, template in kinds:
            by_fleet(fleet, template, short, 1000)
        rounds = [[by_fleet(fleet, template, long, 40) for fleet, template in kinds] for _ in range(3)]
        one, two = (min(times) for times in zip(*rounds, strict=True))
    found.append(Result("cases of 200 ms, two workers", "cases/s", 40 / two, "one worker", 40 / one, ">= 1.9"))
    rounds = [[by_hand_in(count, long, 20) for count in (1, 2)] for _ in range(2)]
    alone, beside = (min(times) for times in zip(*rounds, strict=True))
    name = "  the same by hand, two processes: what the host has"
    found.append(Result(name, "cases/s", 40 / beside, "one process", 20 / alone))
    return [*found, *shipping()]


def both(fleet: Any, template: Any, count: int, cases: int) -> tuple[float, float]:
    """Of a fleet, and by hand: each the best of two, in turn."""
    pairs = [(by_fleet(fleet, template, count, cases), by_hand(count, cases)) for _ in range(2)]
    return min(ours for ours, _ in pairs), min(hand for _, hand in pairs)


def by_hand_in(processes: int, count: int, cases: int) -> float:
    """Seconds for the cases in each of several processes at the same time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(by_hand, [(1, 1)] * processes, chunksize=1)
        began = time.perf_counter()
        pool.starmap(by_hand, [(count, cases)] * processes, chunksize=1)
        return time.perf_counter() - began


def copied_by(source: Path, target: Path) -> tuple[str, float]:
    """How long rsync takes, by its own protocol over loopback, which checks the whole file as we do; where it is not
    installed, a copy."""
    target.unlink(missing_ok=True)
    if shutil.which("rsync") is None:
        began = time.perf_counter()
        shutil.copyfile(source, target)
        took = time.perf_counter() - began
        target.unlink()
        return "a copy of the file", took
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "rsyncd.conf"
        who = f"uid = {os.getuid()}\ngid = {os.getgid()}\n"  # root's would be nobody
        settings.write_text(f"use chroot = no\n{who}[here]\npath = {source.parent}\nread only = yes\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["rsync", "--daemon", "--no-detach", f"--config={settings}", f"--port={port}", "--address=127.0.0.1"]
        with subprocess.Popen(command) as daemon:
            try:
                for _ in range(100):
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                        break
                    time.sleep(0.05)
                began = time.perf_counter()
                address = f"rsync://127.0.0.1:{port}/here/{source.name}"
                subprocess.run(["rsync", "--whole-file", address, target], check=True)
                return "rsync of the file, over loopback", time.perf_counter() - began
            finally:
                daemon.terminate()
                target.unlink(missing_ok=True)


def shipping() -> list[Result]:
    """A template to a host of four workers, and the same once more."""
    with fleets(4) as fleet, made() as machine:
        region = machine.map(0x10_0000, TEMPLATE_MIB << 20)
        for at in range(0, TEMPLATE_MIB, 8):
            region.view[at << 20 : (at + 8) << 20] = os.urandom(8 << 20)
        template = fleet.template(machine)
        copy = Path(template.path).with_name("copy")
        peer, copied = copied_by(template.path, copy)
        address = min(fleet.client.nthreads())
        began = time.perf_counter()
        fleet.client.sync(fleet._seed, template, address)
        shipped = time.perf_counter() - began
        peer, again = copied_by(template.path, copy)
        copied = (copied + again) / 2
        data = Path(fleet.root) / template.id / "data"
        before = data.stat()
        assert before.st_size == template.manifest.size
        first = trivial(fleet, template, 1)
        others = trivial(fleet, template, 40)
        assert data.stat().st_ino == before.st_ino
    return [
        Result(f"a template of {TEMPLATE_MIB} MiB, random, to a host", "s", shipped, peer, copied, "<= 2"),
        Result("  its first case there, which unpacks it", "s", first, "to the host", shipped),
        Result("  40 cases in four workers there, which share it", "s", others, "to the host", shipped),
    ]


def trivial(fleet: Any, template: Any, count: int) -> float:
    began = time.perf_counter()
    results = list(fleet.map(lambda machine, number: number, range(count), template=template, batch=1))
    assert len(results) == count and not any(result.kind for result in results), results[0]
    return time.perf_counter() - began
