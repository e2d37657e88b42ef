"""gdb goes back through the boot of a Linux: ours, and QEMU's record/replay from a snapshot in a qcow2. Both make the
same boot; gdb runs to the function that powers off, takes an instruction back, and all of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.guests import CMDLINE, OFF, qemu_version
from bench.harness import Result, mounted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from pc.initramfs import build  # noqa: E402
from pc.kernels import CLOUD  # noqa: E402

END = "kernel_power_off"
SECONDS = 600  # that gdb, or QEMU, gets
COMMANDS = "continue", "reverse-stepi", "reverse-continue"
SCRIPT = """
set pagination off
set confirm off
set width 0
set remotetimeout 300
target remote {target}
python
import time
def timed(command):
    began = time.perf_counter()
    gdb.execute(command, to_string=True)
    print("timed", command, time.perf_counter() - began, flush=True)
begin = int(gdb.parse_and_eval("$pc"))
gdb.execute("break *{at:#x}")
timed("continue")
assert int(gdb.parse_and_eval("$pc")) == {at:#x}
timed("reverse-stepi")
gdb.execute("delete")
timed("reverse-continue")
assert int(gdb.parse_and_eval("$pc")) == begin
end
"""


def _initrd() -> bytes:
    return build(f"grep ' {END}$' /proc/kallsyms\n{OFF}", kernel=CLOUD)


def _end(said: str) -> int:
    """Where the kernel has put the function."""
    found = re.search(rf"^([0-9a-f]+) \w {END}\s", said, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the guest did not say where {END} is:\n{said[-500:]}")
    return int(found[1], 16)


def _by_gdb(target: str, at: int) -> dict[str, float]:
    """Seconds of each of COMMANDS."""
    with tempfile.NamedTemporaryFile("w", suffix=".gdb") as script:
        script.write(SCRIPT.format(target=target, at=at))
        script.flush()
        command = ["gdb", "-nx", "-q", "-batch", "-x", script.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("timed ")]
    found = {what: float(seconds) for _, what, seconds in lines}
    if found.keys() != set(COMMANDS):
        raise RuntimeError(f"gdb has not come back to the begin: {done.stdout[-300:]}{done.stderr[-300:]}")
    return found


def _ours() -> dict[str, float]:
    with mounted("--engine", "emulator") as mount:
        vm = mount / "reverse"
        vm.mkdir()
        for name, text in (("mem_size", "512M"), ("machine", "pc"), ("time", "instructions"), ("cmdline", CMDLINE)):
            (vm / name).write_text(text)
        (vm / "kernel").write_bytes(CLOUD.image.read_bytes())
        (vm / "initrd").write_bytes(_initrd())
        (vm / "history").write_text("on\n")
        (vm / "vm_run").read_text()
        at = _end((vm / "console.log").read_text())
        (vm / "vm_run").write_text("goto 0\n")
        return _by_gdb(f"| {sys.executable} -m vmfs.cli gdb {vm}", at)


def _qemus() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        (there / "initrd").write_bytes(_initrd())
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", there / "snapshots", "1G"], check=True)

        def command(mode: str) -> list[str]:
            return [
                *"qemu-system-x86_64 -accel tcg -nodefaults -display none -no-reboot -net none -m 512".split(),
                *("-icount", f"shift=1,rr={mode},rrfile={there}/replay.log,rrsnapshot=begin"),
                *("-drive", f"file={there}/snapshots,if=none,id=rr", "-serial", f"file:{there}/{mode}"),
                *("-kernel", str(CLOUD.image), "-initrd", str(there / "initrd"), "-append", CMDLINE),
            ]

        subprocess.run(command("record"), stdin=subprocess.DEVNULL, check=True, timeout=SECONDS)
        at = _end((there / "record").read_text(errors="replace"))
        stub = there / "stub"
        replaying = [*command("replay"), "-S", "-gdb", f"unix:{stub},server=on,wait=off"]
        with subprocess.Popen(replaying, stdin=subprocess.DEVNULL) as process:
            try:
                while not stub.exists() and process.poll() is None:
                    time.sleep(0.05)
                return _by_gdb(os.fspath(stub), at)
            finally:
                process.kill()


def results() -> list[Result]:
    if shutil.which("gdb") is None:
        print("bench history: there is no gdb to go back with", file=sys.stderr)
        return []
    ours, theirs, peer = _ours(), dict[str, float](), qemu_version()
    if not peer:
        print("bench history: there is no QEMU to go back beside", file=sys.stderr)
    else:
        try:
            theirs = _qemus()
        except (RuntimeError, subprocess.SubprocessError) as error:  # on a busy host it may take minutes
            print(f"bench history: QEMU's replay: {error}", file=sys.stderr)
    name = f"{peer}, rr=replay" if theirs else ""
    rows = [Result(f"gdb, a whole boot: {each}", "s", ours[each], name, theirs.get(each)) for each in COMMANDS]
    mark = Result("gdb, a whole boot: reverse-continue", "s", ours[COMMANDS[2]], COMMANDS[0], ours[COMMANDS[0]], "< 2x")
    return [*rows, mark]
