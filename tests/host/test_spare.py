"""The process that waits for its machine, and the lives that are led before there are any."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host.users import A, B, Child, children, is_there, pid_of, status, zygote_of
from mounting import Server, for_plain_processes, spares, wait_until

from vmfs.engine import by_name
from vmfs.host.sandbox import Sandbox
from vmfs.host.zygote import SPARES
from vmfs.machine import gather, warmup


def all_spares(server: Server) -> list[int]:
    wait_until(lambda: len(spares(server.server.pid)) == SPARES, "all spares are there")
    return spares(server.server.pid)


@pytest.fixture
def quiet(own_server) -> Iterator[Server]:
    yield own_server()


def test_the_next_machine_has_one_and_then_there_is_another(quiet):
    ready = all_spares(quiet)
    for spare in ready:
        facts = status(spare)
        assert int(facts["CapBnd"], 16) == 0 and os.listdir(f"/proc/{spare}/root/") == []
    vm = B.makes(quiet.path / "one")
    assert spares(quiet.server.pid) == ready  # a machine that was only made has no process
    pid = pid_of(vm)
    assert pid in ready
    assert status(pid)["Uid"].split() == [str(B.uid)] * 4 and status(pid)["Seccomp"] == "2"
    assert set(all_spares(quiet)) > set(ready) - {pid}
    B.does(vm.path.rmdir)


def test_machines_that_come_at_once_all_have_one(quiet):
    ready = all_spares(quiet)
    machines = [who.makes(quiet.path / f"{who.uid}-{at}") for at in range(3) for who in (A, B)]
    pids = {pid_of(vm) for vm in machines}
    assert len(pids) == 6 and pids > set(ready)
    assert sorted(status(pid)["Uid"].split()[0] for pid in pids) == sorted([str(A.uid), str(B.uid)] * 3)
    for vm in machines:
        vm.path.rmdir()


def test_those_that_are_killed_are_not_missed(quiet):
    ready = all_spares(quiet)
    for spare in ready:
        os.kill(spare, signal.SIGKILL)
    vm = B.makes(quiet.path / "one")
    assert pid_of(vm) not in ready
    assert status(pid_of(vm))["Uid"].split() == [str(B.uid)] * 4
    B.does(vm.path.rmdir)


def test_those_that_are_killed_as_they_become_machines_are_not_missed(quiet):
    """What was asked of such a one is asked of another process, with nobody told: it had done nothing yet."""
    ready = all_spares(quiet)
    for spare in ready:
        os.kill(spare, signal.SIGSTOP)
    vm = B.makes(quiet.path / "one")
    asked = ["stat", "regs", "reg/rip", "state"]
    with ThreadPoolExecutor() as callers:
        answers = [callers.submit((vm.path / file).read_bytes) for file in asked]
        time.sleep(0.3)
        assert not any(answer.done() for answer in answers)
        for spare in ready:
            os.kill(spare, signal.SIGKILL)
        assert all(answer.result(timeout=30) for answer in answers)
    assert pid_of(vm) not in ready
    assert status(pid_of(vm))["Uid"].split() == [str(B.uid)] * 4
    assert vm.read("error") == ""
    B.does(vm.load, "f4")
    assert B.does(vm.run).startswith("hlt")
    B.does(vm.path.rmdir)


def test_machines_that_live_for_a_moment_are_no_spares_that_fail(quiet):
    """The zygote hears late that a spare is a machine, and then it may have ended. Others come soon all the same."""
    for _ in range(8):
        ready = all_spares(quiet)
        vm = B.makes(quiet.path / "one")
        assert pid_of(vm) in ready
        B.does(vm.path.rmdir)
    pid = all_spares(quiet)[0]
    began = time.monotonic()
    wait_until(lambda: len(spares(quiet.server.pid)) == SPARES, "all spares are there")
    assert is_there(pid) and time.monotonic() - began < 5


def sockets(pid: int) -> set[str]:
    found = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return {one for one in found if one.startswith("socket:")}


def test_nobody_else_has_the_zygotes_sockets(quiet, folder):
    """By one of them any host path is opened. Nor has anybody the server's, which say whose a spare becomes."""
    all_spares(quiet)
    machines = [B.makes(quiet.path / f"of{at}") for at in range(3)]
    B.does(machines[0].write, "machine", "pc")
    os.chown(folder, B.uid, B.uid)
    B.does(machines[0].write, "dev/add", f"share {folder} tag")
    for vm in machines:
        pid_of(vm)
    all_spares(quiet)
    zygote = zygote_of(quiet)
    others = [pid for pid in children(quiet.server.pid) if pid != zygote]
    assert len(others) == 5 + SPARES  # three machines, a share, and who keeps the namespace of templates
    wait_until(lambda: len(sockets(zygote)) == 1, "it has closed what its children got")
    for pid in others:
        assert not sockets(pid) & (sockets(zygote) | sockets(quiet.server.pid)), status(pid)["Name"]
    for vm in machines:
        vm.path.rmdir()


def test_it_ends_with_the_server_and_with_the_zygote(own_server):
    for end in (lambda server: server.end(), lambda server: os.kill(zygote_of(server), signal.SIGKILL)):
        server = own_server()
        ready = all_spares(server)
        end(server)
        wait_until(lambda those=ready: not any(map(is_there, those)), "the spares are gone")


def test_spares_that_always_end_keep_nobody_busy(quiet):
    """They come later each time. Machines are made all the same."""
    killed: list[int] = []
    all_spares(quiet)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        for spare in set(spares(quiet.server.pid)) - set(killed):
            os.kill(spare, signal.SIGKILL)
            killed.append(spare)
        time.sleep(0.001)
    assert 2 * SPARES <= len(killed) <= 4 * SPARES
    vm = B.makes(quiet.path / "one")
    assert pid_of(vm) not in killed and status(pid_of(vm))["Uid"].split() == [str(B.uid)] * 4
    B.does(vm.path.rmdir)


def descriptors(pid: int) -> list[str]:
    """What they are of."""
    links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return sorted(re.sub(r"\[[0-9]+\]", "", link) for link in links)


def test_the_life_that_a_spare_leads_leaves_nothing(quiet):
    ready = all_spares(quiet)
    for spare in ready:  # each thread would have to go into the sandbox by itself
        assert os.listdir(f"/proc/{spare}/task") == [str(spare)]
    machines = [B.makes(quiet.path / "one")]
    assert pid_of(machines[0]) in ready
    for spare in all_spares(quiet):
        os.kill(spare, signal.SIGKILL)
    wait_until(lambda: not spares(quiet.server.pid), "they have ended")
    machines.append(B.makes(quiet.path / "two"))  # for which there was no time
    for vm in machines:
        B.does(vm.load, "f4")
        B.does(vm.run)
    assert descriptors(pid_of(machines[0])) == descriptors(pid_of(machines[1]))
    for vm in machines:
        B.does(vm.path.rmdir)


def test_a_thread_that_a_life_leaves_is_no_spares(monkeypatch):
    from vmfs.host import spare

    monkeypatch.setattr(warmup, "THREADS_SECONDS", 0.1)
    monkeypatch.setattr(warmup, "live", lambda *_: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())

    def act() -> str:
        box, channel = Sandbox(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0]
        try:
            spare.main(channel, box, spare.Kind("emulator", 1 << 20), by_name("emulator"), by_name, ahead=True)
        except RuntimeError as error:
            return str(error)
        return "it lives"

    assert Child(0, act).result() == "a thread is left of a life"


# ---- lives that are led before


def tasks() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))


# Those that `threading` does not know: xdist's.
STRANGERS = tasks() - {thread.native_id for thread in threading.enumerate()}


def what_there_is() -> tuple[int, int]:
    """Descriptors and threads. A thread that was joined may still be a task for a moment."""

    def unknown() -> set[int]:
        return tasks() - {thread.native_id for thread in threading.enumerate()} - STRANGERS

    wait_until(lambda: not unknown(), "threads that ended are gone")
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_a_life_leaves_nothing():
    engine = by_name("emulator")
    warmup.live(engine, by_name)
    before = what_there_is()
    assert warmup.live(engine, by_name)
    assert what_there_is() == before


class Gathered:
    """What a life may have: functions that only a class has, wrapped ones, one that others know."""

    def adds(self, number: int, *, more: int = 3) -> list[int]:
        """Its text."""
        return [self.shown + each + more for each in range(number)] + [len(__class__.__name__)]  # type: ignore[name-defined]

    @property
    def shown(self) -> int:
        return self.of_class() + self.of_nobody(2)

    @classmethod
    def of_class(cls) -> int:
        return len(cls.__mro__)

    @staticmethod
    def of_nobody(number: int) -> int:
        return sum(one for one in range(number))

    def known(self) -> str:
        return "known"

    def never(self) -> None:
        raise AssertionError


KNOWN = {"by": Gathered.known}


def run_gathered() -> tuple[object, ...]:
    one = Gathered()
    return one.adds(3), one.adds(2, more=1), one.known(), KNOWN["by"](one), Gathered.known is KNOWN["by"]


def test_what_is_laid_together_does_what_it_did():
    """In a process of its own: it is done to all that there is."""

    def parts() -> dict[str, object]:
        members = vars(Gathered).items()
        found = {name: getattr(value, "__func__", getattr(value, "fget", value)) for name, value in members}
        return {name: value for name, value in found.items() if callable(value)}

    def facts() -> dict[str, object]:
        shown = "__name__", "__qualname__", "__module__", "__doc__", "__kwdefaults__", "__annotations__"
        return {name: [getattr(value, one) for one in shown] for name, value in parts().items()}

    def act() -> tuple[object, ...]:
        before = run_gathered()
        codes = gather.executed(run_gathered)
        old = parts()
        originals = {name: (id(value), id(value.__code__)) for name, value in old.items()}
        told = facts()
        del old
        gather.lay_together(codes)
        now = parts()
        return (
            before == run_gathered(),
            {name for name, value in now.items() if id(value) != originals[name][0]},
            {name for name, value in now.items() if id(value.__code__) != originals[name][1]},
            told == facts(),
            warmup.live(by_name("emulator"), by_name),
        )

    same, moved, copied, alike, lives = Child(0, act).result()
    assert same and alike and lives
    assert moved == {"adds", "shown", "of_class", "of_nobody"}  # and not what a table has, too
    assert copied == moved | {"known"}


def memory_of(pid: int) -> int:
    """KiB that only it has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    facts = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    return facts["Private_Clean"] + facts["Private_Dirty"]


@for_plain_processes
def test_a_machine_has_little_that_no_other_has(quiet):
    """The mark is 6 MiB; bench/house.py measures it."""
    all_spares(quiet)
    vm = B.makes(quiet.path / "one")
    B.does(vm.load, "f4")
    assert B.does(vm.run).startswith("hlt")
    assert memory_of(pid_of(vm)) < 10 << 10
    B.does(vm.path.rmdir)


def test_the_first_machine_has_its_sizes_however_long_it_takes_to_be_born(quiet):
    """tar would copy a file of size 0 as empty."""
    vm = quiet.path / "one"
    ready = all_spares(quiet)
    for spare in ready:
        os.kill(spare, signal.SIGSTOP)
    continued = threading.Timer(2, lambda: [os.kill(spare, signal.SIGCONT) for spare in ready])
    continued.start()
    try:
        vm.mkdir()
        assert (vm / "sregs").stat().st_size == len((vm / "sregs").read_bytes()) > 0
    finally:
        continued.join()
        vm.rmdir()
