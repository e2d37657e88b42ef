"""What works with the wheel alone, without pyfuse3 and a compiler. The Python that has it runs this in an empty
directory: for test_wheel.py, and for scripts/wheels.sh with each version."""

import importlib
import subprocess
import sys
from pathlib import Path

from vmfs import Machine
from vmfs.client import MountFailed, private_mount

SENTENCE = "a mount needs pyfuse3 and trio and pyseccomp, which a client does not: pip install 'vmfs[mount]'"

for part in ("vmfs.devices._chips", "vmfs.engine.kvm._run"):
    importlib.import_module(part)
machine = Machine(memory={0x1000: b"\xb8\x2a\x00\x00\x00\xf4"}, engine="emulator")
with machine.trace() as trace:
    assert str(machine.run(start=0x1000)) == "Hlt(rip=4102, cpu=0)"
assert machine.eax == 42
assert machine.disasm(0x1000)[0][2] == "mov eax, 0x2a"

Path("trace").write_bytes(trace.data)
vmfs_ = str(Path(sys.executable).with_name("vmfs"))
done = subprocess.run([vmfs_, "trace", "trace"], capture_output=True, text=True, check=True)
assert done.stdout == "insn 0x1000\ninsn 0x1005\n", done

try:
    with private_mount():
        raise AssertionError("it mounts")
except MountFailed as failure:
    assert str(failure) == SENTENCE, failure
Path("mount").mkdir()
done = subprocess.run([vmfs_, "mount", "mount"], capture_output=True, text=True)
assert (done.returncode, done.stderr) == (1, f"vmfs mount: {SENTENCE}\n"), done
