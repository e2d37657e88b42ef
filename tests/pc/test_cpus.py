"""Debian's kernel on several CPUs, which the emulator executes in turn."""

from mounting import wait_until
from pc.conftest import boot_linux
from pc.kernels import needs_kernels

pytestmark = needs_kernels
ONLINE = "/sys/devices/system/cpu"


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
    said = pc.shell("dmesg | grep -ciE 'unstable|lockup|stall|BUG:' || true")
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
