"""The compiled core: handlers end in jumps, not calls, or long runs would fill the stack."""

import re
import shutil
import subprocess

import pytest

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
