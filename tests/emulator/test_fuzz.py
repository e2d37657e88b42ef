"""The fuzzer: a sample with a fixed seed, its finds, and that it finds."""

import re

import pytest

pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

from emulator import fuzzing  # noqa: E402

pytestmark = pytest.mark.skipif(fuzzing.missing() is not None, reason=str(fuzzing.missing()))
CASES = 200_000
WAYS_CASES = 100_000


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return fuzzing.build(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def native():
    if fuzzing.sanitized():
        pytest.skip("under AddressSanitizer the core runs alone: wild addresses would hit its shadow")


@pytest.mark.parametrize(
    "way",
    [{"VMFS_NO_JIT": "1"}, {"VMFS_JIT_THRESHOLD": "0"}, {"VMFS_JIT_THRESHOLD": "0", "VMFS_JIT_SEED": "3"}],
    ids=["interpreter", "translator", "random regions"],
)
def test_sample(way, program, monkeypatch):
    for name, value in way.items():
        monkeypatch.setenv(name, value)
    done = fuzzing.run(program, "--cases", CASES, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^total (\d+)$", done.stdout, re.M)[1]) >= CASES
    assert all(int(count) > CASES // 100 for count in re.findall(r"^count .*: (\d+) cases", done.stdout, re.M))
    rows = re.findall(r"^row \d+ (\S+) (\S+) (\d+)$", done.stdout, re.M)
    assert len(rows) > 500
    assert not [name for _, name, count in rows if count == "0"]


def test_ways(program):
    """What the host cannot show: interrupts, page tables and code that change, points to stop at. Host code three ways
    against the interpreter, after each run."""
    done = fuzzing.run(program, "--ways", "--cases", WAYS_CASES, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(count) for count, name in re.findall(r"(\d+) ([a-z ]+)", done.stdout)}
    assert counts["cases"] >= WAYS_CASES
    kinds = ("interrupts", "runs with points", "in steps", "traced", "limit", "debug", "mmio", "killed", "exceptions")
    assert min(counts[kind] for kind in kinds) > WAYS_CASES // 1000


def test_every_find_stays_fixed(program, native):
    done = fuzzing.run(program, "--replay", fuzzing.FINDS)
    cases = sum(line.startswith("case ") for line in fuzzing.FINDS.read_text().splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"replayed {cases} cases, 0 differ" in done.stdout


@pytest.mark.parametrize("name", ["XADD", "PSHUFB", "FYL2X", "FNSTENV", "MOVNTQ"])
def test_a_wrong_result_is_found_and_shrunk(name, program, native, tmp_path):
    """With a core that gets one instruction wrong (--plant changes a register after it)."""
    done = fuzzing.run(program, "--seed", 5, "--finds", 1, "--cases", 100_000, "--plant", name)
    assert done.returncode == 1, done.stdout + done.stderr
    case = re.search(r"^case .*", done.stdout, re.M)[0]
    assert case.partition("#")[2].split(";")[0].split() == [name], done.stdout
    find = tmp_path / "find"
    find.write_text(case + "\n")
    again = fuzzing.run(program, "--replay", find)
    assert again.returncode == 0, f"the core itself is right: {again.stdout}"


def test_a_row_without_a_handler_is_refused(tmp_path, native):
    """A core linked without a file of handlers: its instructions are #UD, as unknown ones are."""
    program = fuzzing.build(tmp_path, without=("ops_crypto",))
    find = tmp_path / "find"
    find.write_text("case 0 0 30010200 660f38dcc1e9f66d5b0a 0 202\n")  # AESENC xmm0, xmm1; jmp to the exit
    done = fuzzing.run(program, "--replay", find)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "host -1 at 0x3a5c7000, core 6 at 0x30010200" in done.stdout
