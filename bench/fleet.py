"""A fleet on this host: what it takes from a case, how two workers go beside each other, and templates.

The peer is the same cases by hand: one machine, set back before each, in one process."""

from __future__ import annotations

import contextlib
import importlib.util
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
        ours, hand = min(by_fleet(fleet, template, short, 4000) for _ in range(2)), by_hand(short, 4000)
        found.append(Result("cases of 1 ms, one worker", "cases/s", 4000 / ours, "by hand", 4000 / hand, ">= 0.8"))
        by_fleet(fleet, template, middle, 100)
        ours, hand = by_fleet(fleet, template, middle, 300), by_hand(middle, 300)
        over = (ours - hand) / 300
        found.append(
            Result(
                "a case of 20 ms takes more by", "ms", over * 1000, "by hand, the whole", hand / 300 * 1000, "<= 5 ms"
            )
        )
        one = by_fleet(fleet, template, long, 60)
    with fleets(2) as fleet, made() as machine:
        template = fleet.template(machine)
        by_fleet(fleet, template, short, 1000)
        two = by_fleet(fleet, template, long, 60)
        found.append(Result("cases of 200 ms, two workers", "cases/s", 60 / two, "one worker", 60 / one, ">= 1.9"))
    return [*found, *shipping()]


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
        began = time.perf_counter()
        first = list(fleet.map(lambda machine, number: number, range(1), template=template))
        once = time.perf_counter() - began
        store = Path(fleet.root) / template.id
        assert not first[0].kind and store.joinpath("data").stat().st_size == template.manifest.size
        before = store.joinpath("data").stat().st_ino
        began = time.perf_counter()
        list(fleet.map(lambda machine, number: number, range(40), template=template, batch=1))
        again = time.perf_counter() - began
        assert store.joinpath("data").stat().st_ino == before
    name = f"a template of {TEMPLATE_MIB} MiB to a host, with its first case"
    return [
        Result(name, "s", once, peer, copied),
        Result("the same template in three more workers, 40 cases", "s", again, "the first", once),
    ]
