"""make fleet: cases on four workers while hosts and networks fail, a matrix of kernels, a campaign, and bisecting.
`python -m fleet.proof [CASES]`; 0 cases: the matrix and what comes after it.

A scheduler and four workers, each in a network namespace of its own with a TMPDIR of its own, so that they are hosts to
each other; where this host has no namespaces for us, on loopback, and then no network is cut. A worker is killed every
few seconds; one network is cut until the scheduler has given the worker up, and healed; between two runs the scheduler
is started again. Every case must have exactly one result, and nothing may stay. Then a Debian's kernel is booted with
8 command lines on 4 models of a CPU (examples/matrix.py), where it was fetched; a planted bug is looked for; and the
instruction at which that kernel first speaks.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

WORKERS = 4
PORT = 8786
TTL = 10
KILL_SECONDS = 4.0
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / ".cache" / "kernels"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
COUNT = bytes.fromhex("48ffc0 48ffc9 75f8 f4")  # l: inc rax; dec rcx; jne l; hlt


class Hosts:
    """Network namespaces on a bridge in one of them; the first is the scheduler's."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._name = f"vf{os.getpid() % 100_000}"
        self.has_networks = True
        try:
            for number in range(WORKERS + 1):
                self._ip("netns", "add", self._space(number))
                stack.callback(self._ip, "netns", "del", self._space(number))
            self._ip("-n", self._space(0), "link", "add", "bridge0", "type", "bridge")
            self._ip("-n", self._space(0), "addr", "add", "10.213.0.1/24", "dev", "bridge0")
            for name in ("bridge0", "lo"):
                self._ip("-n", self._space(0), "link", "set", name, "up")
            for number in range(1, WORKERS + 1):
                self._ip("-n", self._space(0), "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0",
                         "netns", self._space(number))
                self._ip("-n", self._space(0), "link", "set", f"to{number}", "master", "bridge0", "up")
                self._ip("-n", self._space(number), "addr", "add", f"10.213.0.{number + 1}/24", "dev", "eth0")
                for name in ("eth0", "lo"):
                    self._ip("-n", self._space(number), "link", "set", name, "up")
        except (OSError, subprocess.CalledProcessError) as failure:
            print(f"no namespaces here ({failure}): all on loopback, and no network is cut")
            self.has_networks = False

    def _space(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def address(self, number: int) -> str:
        return f"10.213.0.{number + 1}" if self.has_networks else "127.0.0.1"

    def command(self, number: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self._space(number), *words] if self.has_networks else list(words)

    def cut(self, number: int, is_cut: bool) -> None:
        self._ip("-n", self._space(0), "link", "set", f"to{number}", "down" if is_cut else "up")


@contextlib.contextmanager
def process(hosts: Hosts, number: int, folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(exist_ok=True)
    environment = {
        **ENVIRONMENT,
        "TMPDIR": str(folder),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{TTL}s",
    }
    command = hosts.command(number, sys.executable, "-m", *words)
    with open(folder / "said", "ab") as said:
        started = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
    try:
        yield started
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def scheduler(hosts: Hosts, folder: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    words = ("distributed.cli.dask_scheduler", "--host", hosts.address(0), "--port", str(PORT), "--no-dashboard")
    return process(hosts, 0, folder / "scheduler", *words)


def worker(hosts: Hosts, folder: Path, number: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    words = ("distributed.cli.dask_worker", f"tcp://{hosts.address(0)}:{PORT}", "--nthreads", "1", "--no-dashboard",
             "--memory-limit", "1GiB", "--host", hosts.address(number), "--name", f"w{number}")
    return process(hosts, number, folder / f"host{number}", *words)


# ---- in the scheduler's namespace


def drive(address: str, cases: int) -> None:
    from distributed import Client

    from vmfs import Machine
    from vmfs.fleet import Fleet

    def case(machine: object, number: int) -> int:
        machine.rcx = 1 + number % 1000
        machine.run()
        time.sleep(0.05)
        return machine.rax

    with Client(address) as client, Fleet(client, linger=2) as fleet, Machine(memory={0x1000: COUNT}) as machine:
        client.wait_for_workers(1, timeout=120)
        machine.rip = 0x1000
        machine.map(0x10_0000, os.urandom(6 << 20))
        template = fleet.template(machine)
        began, numbers = time.monotonic(), Counter[int]()
        workers: Counter[str] = Counter()
        wrong = []
        for result in fleet.map(case, range(cases), template=template, retries=20):
            numbers[result.number] += 1
            if len(numbers) % 100 == 0:
                print(f"{len(numbers)} cases after {time.monotonic() - began:.0f} s", flush=True)
            workers[result.worker] += 1
            if result.kind or result.value != 1 + result.number % 1000:
                wrong.append(result)
        assert not wrong, wrong[:3]
        assert numbers == Counter(range(cases)), "a case has no result, or several"
        print(f"{cases} cases, each with one result, of {len(workers)} workers in their lives", flush=True)


def recipes(address: str) -> None:
    """A campaign that finds a planted bug, and bisecting the boot of a kernel by instructions."""
    from distributed import Client
    from fleet.test_recipes import PARSER, feed

    from vmfs import Machine
    from vmfs.client import Vm, private_mount
    from vmfs.fleet import Fleet

    def has_spoken(vm: Vm, instructions: int) -> bool:
        vm.run(insns=instructions)
        return vm.console.tail() != "" and "Linux version" in vm.console.said

    emulator = ("--engine", "emulator")
    with Client(address) as client, Fleet(client, mount_options=emulator) as fleet:
        client.wait_for_workers(WORKERS, timeout=120)
        with Machine(memory={0x1000: PARSER, 0x5000: 0x1000}) as machine:
            template = fleet.template(machine)
        campaign = fleet.fuzz(feed, [b"nothing"], template=template, seconds=300, stop=True)
        assert [bug.input[:3] for bug in campaign.bugs] == [b"BUG"] * len(campaign.bugs) and campaign.bugs, campaign
        print(f"the planted bug was found after {campaign.cases} inputs, {campaign.seconds:.1f} s", flush=True)
        began = time.monotonic()
        with private_mount(emulator) as mount, Vm.create(mount / "one", mem_size="256M", engine="emulator") as vm:
            vm.write("time", "instructions\n")
            vm.boot(KERNELS / "cloud/vmlinuz", cmdline="console=ttyS0 earlyprintk=ttyS0", start=False)
            template = fleet.template(vm)
        found = fleet.bisect(has_spoken, 0, 100_000_000, template=template, timeout=600)
        around = {result.input: result.value for result in fleet.map(has_spoken, [found - 1, found], template=template)}
        assert around == {found - 1: False, found: True}, around
        print(f"the kernel speaks first at instruction {found}: {time.monotonic() - began:.0f} s", flush=True)


def without_trouble(hosts: Hosts, folder: Path) -> int:
    """On the same hosts, with nothing that goes wrong."""
    kernel, busybox = KERNELS / "cloud/vmlinuz", KERNELS / "busybox"
    if not kernel.exists() or not busybox.exists():
        print(f"no matrix: there is no {kernel} (scripts/fetch_kernels.sh)")
        return 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(scheduler(hosts, folder))
        for number in range(1, WORKERS + 1):
            stack.enter_context(worker(hosts, folder, number))
        command = [sys.executable, str(ROOT / "examples" / "matrix.py"), str(kernel), str(busybox)]
        address = f"tcp://{hosts.address(0)}:{PORT}"
        for words in ([*command, address], [sys.executable, "-m", "fleet.proof", "recipes", address]):
            if code := subprocess.run(hosts.command(0, *words), env=ENVIRONMENT, check=False).returncode:
                return code
        return 0


# ---- what goes wrong


def trouble(hosts: Hosts, workers: list[subprocess.Popen[bytes]], done: threading.Event, seed: int) -> None:
    import psutil

    rng, kills, cut = random.Random(seed), 0, False
    if hosts.has_networks:

        def cut_one() -> None:
            hosts.cut(2, True)
            time.sleep(2.5 * TTL)
            hosts.cut(2, False)
            print("a network was cut and healed", flush=True)

        threading.Timer(8, cut_one).start()
    while not done.wait(KILL_SECONDS):
        nanny = rng.choice(workers)
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(nanny.pid).children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    kills += 1
                    break
    print(f"{kills} workers were killed; cut: {cut or hosts.has_networks}", flush=True)


def left(folder: Path) -> list[str]:
    return [str(path) for number in range(1, WORKERS + 1) for path in (folder / f"host{number}").glob("vmfs-fleet*/*")]


def main() -> int:
    if sys.argv[1:2] == ["drive"]:
        drive(sys.argv[2], int(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["recipes"]:
        recipes(sys.argv[2])
        return 0
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="vmfs-fleet-proof-"))
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack)
        # Each with a scheduler that was started for it; the workers of the first have gone.
        for run in range(2 if cases else 0):
            with contextlib.ExitStack() as one:
                one.enter_context(scheduler(hosts, folder))
                workers = [one.enter_context(worker(hosts, folder, number)) for number in range(1, WORKERS + 1)]
                done = threading.Event()
                troubles = threading.Thread(target=trouble, args=(hosts, workers, done, run))
                command = [sys.executable, "-m", "fleet.proof", "drive", f"tcp://{hosts.address(0)}:{PORT}", str(cases)]
                with subprocess.Popen(hosts.command(0, *command), env=ENVIRONMENT) as driver:
                    time.sleep(5)
                    troubles.start()
                    code = driver.wait()
                done.set()
                troubles.join()
                if code:
                    print(f"run {run}: the driver ended with {code}; what processes said is in {folder}")
                    return 1
        if without_trouble(hosts, folder):
            return 1
        end = time.monotonic() + 60
        while (stays := left(folder)) and time.monotonic() < end:
            time.sleep(0.5)
        if stays:
            print(f"this stays: {stays}")
            return 1
        mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
        if mounts:
            print(f"these mounts stay: {mounts}")
            return 1
    shutil.rmtree(folder)
    print("nothing stays")
    return 0


if __name__ == "__main__":
    sys.exit(main())
