"""The compiled core: handlers end in jumps, not calls, or long runs would fill the stack. With sanitizers, which make
calls of such jumps, they return to a loop."""

import re
import shutil
import subprocess
import threading

import pytest
from engine.asm import assemble
from engine.machine import machine_on

from vmfs.engine.emulator.engine import EmulatorEngine

_core = pytest.importorskip("vmfs.engine.emulator._core", reason="the emulator core is not built: make setup")

HANDLER = re.compile(r"^(op_\w+|\w+_(reg|mem|fast)(_(8|16|32|64))?|(call|ret|push|pop)_\w+)$")


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is missing")
def test_handlers_end_in_jumps():
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    calls, seen, name = [], 0, ""
    for line in listing.splitlines():
        if match := re.match(r"^[0-9a-f]+ <([\w.]+)>:$", line):
            name = match[1].partition(".")[0]
            seen += bool(HANDLER.match(name))
        elif HANDLER.match(name) and re.search(r"\bcall\s+\*", line):
            calls.append(f"{name}: {line.strip()}")
    if "__asan" in listing:
        pytest.skip("a sanitizer build")
    assert seen > 400, "the handlers were not found: their names changed, or the symbols were stripped"
    assert not calls, calls[:10]


def test_a_long_run_does_not_fill_the_stack():
    """Three million handlers in a row, by each kind of dispatch: the next record, a link, the jump cache."""
    program = assemble("lea rax, there[rip]\njmp rax\nnop\nthere: jmp _start", "long")
    ended = []

    def run() -> None:
        with machine_on(EmulatorEngine()) as one:
            one.load(program, "long")
            ended.append((one.vcpu.run(budget=3_000_000).REASON, one.vcpu.counters()["instructions"]))

    before = threading.stack_size(512 << 10)  # a frame of 16 bytes a handler would be 48 MB
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert ended == [("limit", 3_000_000)]
