"""Debian's kernel on several CPUs, which the emulator executes at the same time, and in turn where time follows the
instructions."""

import shutil
import subprocess
from pathlib import Path

import pytest
from mounting import wait_until
from pc.conftest import boot_linux
from pc.kernels import needs_kernels

pytestmark = needs_kernels
ONLINE = "/sys/devices/system/cpu"


# By hand: more of each, 16 CPUs, the generic kernel.
THREADS = {
    "locks": (20_000, "added 80000 swapped 240000 mutex 5000 lock 5000\n"),
    "shootdowns": (60, "wrong 0\n"),
    "ball": (200, "passed 800\n"),
    "code": (10, "wrong 0 called 30\n"),
}


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: the guest's program is compiled")
@pytest.mark.parametrize("time", ["host", "instructions"])
def test_threads_that_get_in_each_others_way(make_pc, tmp_path, time):
    """Locks, mprotect and munmap, futexes, code that another thread writes (threads.c)."""
    program = tmp_path / "threads"
    source = Path(__file__).with_name("threads.c")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, source], check=True)
    pc = make_pc()
    pc.write("cpus", "4")
    pc.write("time", time)
    boot_linux(pc, files={"bin/threads": program.read_bytes()})
    pc.expect("guest# ")
    for name, (rounds, said) in THREADS.items():
        assert pc.shell(f"threads {name} 4 {rounds} 2>/dev/null") == said


def test_sixteen(make_pc):
    pc = make_pc()
    pc.write("cpus", "16")
    boot_linux(pc)
    pc.expect("guest# ")
    assert pc.shell("nproc") == "16\n"
    assert pc.shell("dmesg | grep -ciE 'unstable|lockup|BUG:|warp' || true") == "0\n"


def test_every_cpu_works_and_goes_off_and_on(make_pc):
    pc = make_pc()
    pc.write("cpus", "4")
    boot_linux(pc)
    pc.expect("guest# ")
    assert pc.shell("nproc") == "4\n"
    said = pc.shell("for i in 0 1 2 3; do taskset -c $i sh -c 'cut -d\" \" -f39 /proc/$$/stat'; done")
    assert said.split() == ["0", "1", "2", "3"]  # the CPU that each ran on
    pc.shell(f"cd {ONLINE}; dmesg -n 1")
    assert pc.shell("echo 0 > cpu2/online; nproc; cat online") == "3\n0-1,3\n"
    assert (pc.path / "cpu2" / "state").read_text() in ("wait-for-sipi\n", "halted\n")
    assert pc.shell("echo 1 > cpu2/online; nproc; cat online") == "4\n0-3\n"
    # Within the 80 columns that the shell echoes on a line.
    said = pc.shell("dmesg | grep -ciE 'unst|lockup|stall|BUG:|warp' || true")
    assert said == "0\n"
    counts = [(pc.path / f"cpu{cpu}" / "stat").read_text() for cpu in range(4)]
    assert all(int(text.split("instructions ")[1].split()[0]) > 1_000_000 for text in counts)
    pc.type("poweroff -f\n")
    assert pc.ended().startswith("shutdown cause=poweroff ")


def test_it_is_paused_and_removed_at_any_moment(make_pc):
    pc = make_pc()
    pc.write("cpus", "8")
    boot_linux(pc)
    for _ in range(20):
        wait_until(lambda: pc.read("state") == "running\n", "it runs")
        pc.write("state", "pause")
        assert pc.ended().startswith("interrupted ")
        assert {(pc.path / f"cpu{cpu}" / "state").read_text() for cpu in range(8)} <= {
            "running\n", "halted\n", "wait-for-sipi\n"
        }  # fmt: skip
        pc.start()
    pc.path.rmdir()
    pc.ended()
