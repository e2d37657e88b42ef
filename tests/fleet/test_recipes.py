"""Fuzzing, bisecting, the command, and tests on a fleet."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap

import pytest

from vmfs import Machine
from vmfs.words.errors import Invalid

# rdi is the input, rsi its length: a store to 0 where it begins with BUG, byte by byte
PARSER = bytes.fromhex(
    "4883fe03 7219 803f42 7514 807f0155 750e 807f0247 7508 c604250000000000 f4"
    # cmp rsi, 3; jb e; cmp byte [rdi], 'B'; jne e; [rdi+1], 'U'; [rdi+2], 'G'; mov byte [0], 0; e: hlt
)


def feed(machine, data):
    machine.mem[0x5000:] = data[:256]
    machine.rdi, machine.rsi = 0x5000, min(len(data), 256)
    machine.run(start=0x1000, insns=10_000)


def test_a_planted_bug_is_found(fleet):
    with Machine(memory={0x1000: PARSER, 0x5000: 0x1000}) as machine:
        for text, reason in ((b"BUX", "hlt"), (b"BUG", "mmio"), (b"", "hlt")):
            feed(machine, text)
            assert machine.exit.REASON == reason, text
            machine.rip = 0x1000
        template = fleet.template(machine)
    words = [b"B", b"U", b"G"]  # make fleet finds it without them
    options = {"template": template, "words": words, "seconds": 60, "slice_seconds": 0.5}
    campaign = fleet.fuzz(feed, [b"nothing"], stop=True, seed=7, **options)
    assert campaign.bugs, campaign
    assert campaign.bugs[0].input.startswith(b"BUG") and campaign.bugs[0].exit.startswith("mmio")
    assert campaign.cases > 100 and campaign.edges and not campaign.failures
    assert any(data.startswith(b"BU") for data in campaign.corpus)


def test_the_first_that_is_bad_is_found(fleet, counting):
    def is_past(machine, instructions):
        machine.rcx = 1 << 40
        machine.run(insns=instructions)
        return machine.rax >= 1000

    assert fleet.bisect(is_past, 0, 10_000, template=counting) == 2998
    kernels = [f"kernel-{number}" for number in range(40)]
    assert fleet.bisect(lambda machine, name: name >= "kernel-7", sorted(kernels)) == "kernel-7"
    with pytest.raises(Invalid, match="good does not come before"):
        fleet.bisect(odd, 0, 100)
    with pytest.raises(Invalid, match="predicate failed"):
        fleet.bisect(odd, 100, 103)


def odd(machine, number):
    return 1 // (number < 100) and number < 50


def vmfs(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, "-m", "vmfs.cli", "fleet", *map(str, words))
    return subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, **options)


def test_the_command_goes_on_where_it_stopped(client, tmp_path, counting):
    (tmp_path / "inputs").mkdir()
    for number in range(1, 9):
        (tmp_path / f"inputs/{number}").write_text(f"{number * 10}")
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os
        def case(machine, file):
            if file.name == "3":
                raise ValueError("=3")
            machine.rcx = int(file.data)
            machine.run()
            with open(os.environ.get("NOWHERE", "/dev/null"), "w"):
                return {"rax": machine.rax}
    """)
    )
    (tmp_path / "template").write_bytes(counting.path.read_bytes())
    words = [
        "run",
        tmp_path / "script.py",
        "--scheduler",
        client.scheduler.address,
        "--template",
        tmp_path / "template",
        "--inputs",
        f"{tmp_path}/inputs/*",
        "--out",
        tmp_path / "out",
        "--keep",
    ]
    done = vmfs(*words)
    assert (done.returncode, done.stdout.split(":")[0]) == (1, "8 cases, 1 failed"), done.stderr
    with open(tmp_path / "out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [str(number) for number in range(1, 9)]
    assert [row["kind"] for row in rows] == ["", "", "raised", "", "", "", "", ""]
    assert rows[2]["error"] == "ValueError: =3" and rows[0]["exit"].startswith("hlt")
    assert json.loads((tmp_path / "out/5/value.json").read_text()) == {"rax": 50}
    with Machine.load((tmp_path / "out/3/machine.vmfs").read_bytes()) as machine:
        assert machine.rip == 0x1000
    assert sorted(os.listdir(tmp_path / "out")) == [*(str(number) for number in range(1, 9)), "results.csv"]
    stamp = os.stat(tmp_path / "out/5/result.json").st_mtime_ns
    (tmp_path / "out/7/result.json").unlink()
    again = vmfs(*words)
    assert "7 of 8 cases are there already" in again.stderr and again.stdout.startswith("8 cases, 1 failed")
    assert os.stat(tmp_path / "out/5/result.json").st_mtime_ns == stamp
    assert json.loads((tmp_path / "out/7/value.json").read_text()) == {"rax": 70}


def test_the_command_says_what_is_wrong(tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "case.py").write_text("def case(machine, file): pass")
    (tmp_path / "file").write_text("")
    common = ["--inputs", tmp_path / "file", "--out", tmp_path / "out"]
    for words, sentence in (
        (["run", tmp_path / "empty.py", *common], "has no function `case"),
        (["run", tmp_path / "none.py", *common], "No such file"),
        (["run", tmp_path / "case.py", "--scheduler", "nowhere", *common], "missing port number in address"),
        (["run", tmp_path / "case.py", "--scheduler", "tls://127.0.0.1:1", *common], "TLS"),
        (["run", tmp_path / "empty.py", "--inputs", tmp_path / "x*", "--out", tmp_path / "out"], "no file is"),
    ):
        if sentence == "no file is":
            (tmp_path / "empty.py").write_text("def case(machine, file): pass")
        done = vmfs(*words)
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


TESTS = """
import os, pytest

@pytest.mark.fleet
@pytest.mark.machine(memory={0x1000: bytes.fromhex("b805000000f4")})
@pytest.mark.parametrize("number", [1, 2])
def test_there(number, tmp_path, machine):
    assert "VMFS_FLEET_RUNNER" in os.environ
    machine.run(start=0x1000)
    assert machine.rax == 5
    assert number != 2, "two"
    assert open(os.path.join(os.path.dirname(__file__), "data")).read() == "beside"

@pytest.mark.fleet
def test_skips():
    pytest.skip("as it is")

@pytest.mark.fleet
def test_dies():
    os._exit(9)

def test_here():
    assert "VMFS_FLEET_RUNNER" not in os.environ
"""


def test_tests_run_there(client, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_one.py").write_text(TESTS)
    (tmp_path / "tests/data").write_text("beside")
    plugins = ("anyio", "hypothesispytest", "timeout", "xdist", "xdist.looponfail")  # they take most of its time
    (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = {' '.join(f'-p no:{name}' for name in plugins)}\n")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "vmfs.fleet",
        "--scheduler",
        client.scheduler.address,
        "-v",
        "-rA",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False, env=environment
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "2 failed, 2 passed, 1 skipped" in lines[-1], done.stdout
    assert any("AssertionError: two" in line for line in lines)
    assert any("it ran on tcp://" in line for line in lines)
    assert any("pytest ended with 9" in line for line in lines)
