"""What a worker makes of its runners, without a cluster."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib

import pytest
from fleet.test_cases import has
from mounting import wait_until

from vmfs.fleet.fuzz import MAP, _taken
from vmfs.fleet.processes import TOKEN
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
