"""What a worker makes of its runners, without a cluster."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import zlib

import cloudpickle
import dask
import psutil
import pytest
from fleet.test_cases import has
from mounting import wait_until

from vmfs.fleet import local, processes, supervisor
from vmfs.fleet.fleet import _Pace
from vmfs.fleet.fuzz import MAP, _taken
from vmfs.fleet.processes import TOKEN, descendants
from vmfs.fleet.results import Raw, Result
from vmfs.fleet.runner import Case, Job
from vmfs.fleet.supervisor import Limits, Supervisor

# A worker whose case lets no other thread of its process run: `(a+)+$` takes 2**60 turns in C, with the lock of Python
HOLDS = """
import os, re, sys, time
from pathlib import Path
from types import SimpleNamespace
import cloudpickle, msgspec
from vmfs.fleet.runner import Case
from vmfs.fleet.worker import FleetPlugin, Work
from vmfs.fleet.supervisor import Limits

def case(machine, path):
    Path(path).touch()
    return re.match("(a+)+$", "a" * 60 + "b")

plugin = FleetPlugin("vmfs-fleet-x", 0.0, sys.argv[1])
plugin._set_up(SimpleNamespace(address="", memory_manager=SimpleNamespace(memory_limit=0)))
print(plugin._token, flush=True)
work = Work(cloudpickle.dumps(case), Limits(1000))
plugin.run(msgspec.msgpack.encode(work), [Case(0, cloudpickle.dumps(sys.argv[2]))])
"""


def test_a_case_that_holds_its_process_ends_with_its_worker(tmp_path):
    begun, store = tmp_path / "begun", tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDS, store, begun]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        mark = f"{TOKEN}={worker.stdout.readline().strip()}".encode()
        wait_until(begun.exists, "the case has begun")

        def there() -> list[str]:
            return [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if has(pid, mark)]

        assert there()
        worker.kill()
        wait_until(lambda: not there(), "its runner has ended")
    wait_until(lambda: not store.exists(), "nothing of it is left")


@pytest.mark.parametrize("said", [math.nan, math.inf, -1.0, 100.0])
def test_how_long_a_case_took_is_bounded(tmp_path, monkeypatch, said):
    supervisor = Supervisor(Job(b""), Limits(5), tmp_path)
    monkeypatch.setattr(supervisor, "_send", lambda what: None)
    monkeypatch.setattr(supervisor, "_receive", lambda end, sentence: Raw(7, seconds=said))
    assert [raw.seconds for raw in supervisor._run_some([Case(7, b"")], 0)] == [5]


def test_a_slice_that_has_no_result_is_told(tmp_path):
    good = {"found": [(b"input", zlib.compress(b"\x01" + bytes(MAP - 1)))], "bugs": [("hlt", b"")], "cases": 3}
    sent, maps = _taken(Result(0, None, good))
    assert sent.cases == 3 and maps == [(b"input", 1)]
    maps = [[(b"", data)] for data in (b"no map", zlib.compress(bytes(MAP + 1)))]
    for wrong in (None, {"cases": -1}, {"bugs": None}, *({"found": each} for each in maps)):
        with pytest.raises(ValueError, match="value: a slice has no such result"):
            _taken(Result(0, None, {**good, **wrong} if wrong else wrong))
    with pytest.raises(ValueError, match="timeout: late"):
        _taken(Result(0, None, None, "timeout", "late"))


# A process whose child is a thread's, and has two of its own
TREE = """
import subprocess, threading
sleep = ["sh", "-c", "sleep 1000 & echo; sleep 1000 & wait"]
threading.Thread(target=subprocess.run, args=[sleep]).start()
"""


@pytest.mark.parametrize("way", ["by threads", "no children", "many threads"])
def test_the_descendants_of_a_process(monkeypatch, way):
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 3, "it has all of them")
            if way == "no children":  # of a kernel without CONFIG_PROC_CHILDREN
                monkeypatch.setattr(processes, "_HAS_CHILDREN", False)
                monkeypatch.setattr(processes, "_read", raise_none)
            elif way == "many threads":
                monkeypatch.setattr(processes, "_THREADS_MOST", 1)
            found = descendants(process.pid)
            assert sorted(found) == sorted(each.pid for each in psutil.Process(process.pid).children(recursive=True))
        finally:
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
    assert descendants(process.pid) == []


def raise_none(path):
    raise FileNotFoundError(path)


def test_where_there_are_no_namespaces_the_runner_counts_beside_its_children(tmp_path, monkeypatch):
    def case(machine, given):
        if os.fork() == 0:
            time.sleep(50)
        kept = b"x" * (300 << 20)
        time.sleep(50)
        return len(kept)

    monkeypatch.setattr(supervisor, "isolation", lambda: ())
    one = Supervisor(Job(cloudpickle.dumps(case)), Limits(30, memory=250 << 20), tmp_path, token="vmfs-fleet-test")
    (raw,) = one.run([Case(0, cloudpickle.dumps(0))])
    one.close()
    assert raw.kind == "memory", raw


def test_tasks_are_long_and_the_last_ones_short():
    pace = _Pace(threads=2, given=None)
    assert pace.size(40) == 1
    pace.learn([Raw(0, seconds=0.2), Raw(1, seconds=0.2)])
    assert [pace.size(left) for left in (1000, 20, 12, 8, 7, 1)] == [5, 5, 3, 2, 1, 1]
    assert pace.size(None) == 1
    pace.learn([Raw(number, seconds=0.001) for number in range(10_000)])
    assert 700 < pace.size(10_000) < 1000 and 170 < pace.size(None) < 250
    assert 30 < pace.size(20) < 50
    assert _Pace(threads=2, given=7).size(1) == 7


def test_the_users_configuration_of_dask_wins(monkeypatch):
    seen, quiet = [], local.QUIET
    monkeypatch.setattr(local, "LocalCluster", lambda **_: seen.append({name: dask.config.get(name) for name in quiet}))
    local.local_cluster()
    own = {"distributed.admin.tick.interval": "30ms", "distributed.worker.memory.monitor_interval": "50ms"}
    with dask.config.set(own):
        local.local_cluster()
    assert seen[0] == quiet
    assert seen[1] == {**quiet, "distributed.admin.tick.interval": "30ms",
                       "distributed.worker.memory.monitor-interval": "50ms"}  # fmt: skip
    assert dask.config.get("distributed.admin.tick.interval") == "20ms"
