"""gdb goes back through the boot of a Linux: ours, and QEMU's record/replay from a snapshot in a qcow2. Both make the
same boot; gdb runs to the function that powers off, takes an instruction back, and goes back to the first one in C.
"""

from __future__ import annotations

import contextlib
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

START, END = "start_kernel", "kernel_power_off"
SECONDS = 300  # that a session of gdb, or QEMU, gets
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
    return time.perf_counter() - began
def to(place, command):
    gdb.execute("delete")
    gdb.execute(f"break *{{place:#x}}", to_string=True)
    seconds = timed(command)
    assert int(gdb.parse_and_eval("$pc")) == place
    print("timed", command, seconds, flush=True)
to({end:#x}, "continue")
print("timed", "reverse-stepi", timed("reverse-stepi"), flush=True)
to({start:#x}, "reverse-continue")
end
"""


def _initrd() -> bytes:
    return build(f"grep -E ' ({START}|{END})$' /proc/kallsyms\n{OFF}", kernel=CLOUD)


def _place(name: str, said: str) -> int:
    """Where the kernel has put a function."""
    found = re.search(rf"^([0-9a-f]+) \w {name}\s", said, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the guest did not say where {name} is:\n{said[-500:]}")
    return int(found[1], 16)


def _by_gdb(target: str, said: str) -> dict[str, float]:
    """Seconds of each of COMMANDS that has come to its end in time."""
    with tempfile.NamedTemporaryFile("w", suffix=".gdb") as script, tempfile.TemporaryFile("w+") as told:
        script.write(SCRIPT.format(target=target, start=_place(START, said), end=_place(END, said)))
        script.flush()
        command = ["gdb", "-nx", "-q", "-batch", "-x", script.name]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=told, stderr=subprocess.STDOUT, timeout=SECONDS)
        told.seek(0)
        lines = told.readlines()
    found = {what: float(seconds) for _, what, seconds in (line.split() for line in lines if line.startswith("timed "))}
    for one in COMMANDS:
        if one not in found:
            print(f"bench history: {one} did not come to its end: {''.join(lines[-4:])}", file=sys.stderr)
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
        said = (vm / "console.log").read_text()
        (vm / "vm_run").write_text("goto 0\n")
        return _by_gdb(f"| {sys.executable} -m vmfs.cli gdb {vm}", said)


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
        said = (there / "record").read_text(errors="replace")
        stub = there / "stub"
        replaying = [*command("replay"), "-S", "-gdb", f"unix:{stub},server=on,wait=off"]
        with subprocess.Popen(replaying, stdin=subprocess.DEVNULL) as process:
            try:
                while not stub.exists() and process.poll() is None:
                    time.sleep(0.05)
                return _by_gdb(os.fspath(stub), said)
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
    if ours.keys() != set(COMMANDS):
        return []
    rows = []
    for one in COMMANDS:
        theirs_here = theirs.get(one)
        rows.append(
            Result(f"gdb, a boot: {one}", "s", ours[one], f"{peer}, rr=replay" if theirs_here else "", theirs_here)
        )
    forward, *_, back = (ours[one] for one in COMMANDS)
    return [*rows, Result("gdb, a boot: reverse-continue", "s", back, "continue", forward, "< 2x")]
