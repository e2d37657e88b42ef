"""vmfs.client drives a PC: boots it, talks to its console, its keyboard and its screen."""

import subprocess
import sys
from pathlib import Path

import pytest
from pc.initramfs import SHELL, build
from pc.kernels import CLOUD

from vmfs.client import MountFailed, Vm, private_mount
from vmfs.words import exits

BOOT_SECONDS = 200


@pytest.fixture
def vm(pc_mount):
    with Vm.temporary(pc_mount, mem_size="256M") as vm:
        yield vm


@pytest.mark.skipif(not CLOUD.image.exists(), reason="Debian's cloud kernel was not fetched")
def test_a_linux_is_booted_and_talked_to(vm, tmp_path):
    image = tmp_path / "initrd"
    image.write_bytes(build(SHELL))
    vm.boot(CLOUD.image, initrd=image, cmdline="console=ttyS0 quiet")
    vm.console.expect("guest# ", timeout=BOOT_SECONDS)
    assert vm.console.command("echo $((6 * 7)); uname -m", "guest# ", timeout=BOOT_SECONDS) == "42\nx86_64\n"
    assert "guest#" in vm.console.tail(1)
    vm.pause()
    assert vm.stat["instructions"] > 100_000_000
    vm.find_symbols()
    stop = vm.breakpoint("__x64_sys_sethostname", once=True)
    vm.start()
    vm.console.send_line("hostname there")
    ended = vm.wait(timeout=BOOT_SECONDS)
    assert isinstance(ended, exits.Debug) and ended.id == stop and ended.rip == vm.symbol("__x64_sys_sethostname")
    vm.start()
    vm.console.expect("guest# ", timeout=BOOT_SECONDS)
    vm.console.send_line("poweroff -f")
    ended = vm.wait(timeout=BOOT_SECONDS)
    assert isinstance(ended, exits.Shutdown) and ended.cause == "poweroff"
    with pytest.raises(EOFError, match="the machine is off"):
        vm.console.expect("never")


def test_what_is_expected_and_does_not_come_is_told_with_what_came(vm):
    sector = bytearray(bytes.fromhex("baf803 b04f ee b04b ee ebfe")).ljust(512, b"\0")  # out 3F8h: O, K; then a loop
    sector[510:] = b"\x55\xaa"
    vm.boot(bytes(sector), cmdline=None)
    vm.console.expect("O")
    with pytest.raises(TimeoutError, match=r"'never' did not come within 0.2 s after:\nOK"):
        vm.console.expect("never", timeout=0.2)
    assert vm.console.expect("K").start() == 1  # nothing was lost by that
    assert vm.console.read() == ""
    assert vm.screen == "\n" * 24
    assert vm.screenshot().startswith(b"\x89PNG")
    vm.press("ctrl-alt-del")
    vm.type('root\n"quoted" \\\t')
    assert {"display", "bridge"} <= set(vm.devices)


def test_devices_come_and_go_before_the_first_run(vm, tmp_path):
    disk = tmp_path / "a disk"
    disk.write_bytes(bytes(1 << 20))
    vm.write("machine", "pc\n")
    assert vm.add_device("blk", str(disk), "cow") == "blk0"
    assert vm.read_text("dev/blk0/type") == "virtio-blk"
    vm.remove_device("blk0")
    assert "blk0" not in vm.devices


def test_a_mount_of_ones_own_goes_with_its_process():
    with private_mount(["--engine", "emulator"]) as mount, Vm.temporary(mount) as vm:
        assert vm.engine == "emulator"
    assert not mount.exists()
    program = "import os, vmfs.client as c\nwith c.private_mount() as m: print(m, flush=True); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert killed.returncode == -9
    left = Path(killed.stdout.strip())
    for _ in range(600):
        if not left.exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert not left.exists()
    with pytest.raises(MountFailed, match="'none' is none of auto, kvm"), private_mount(["--engine", "none"]):
        pass
