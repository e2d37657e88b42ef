"""Forks of one snapshot that are made again and again: processes that a template has forked."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host.openers import sandbox
from host.test_sandbox import FORBIDDEN, WHO, all_calls, call, inside
from host.users import B, children, is_there, pid_of, status, word_of, zygote_of
from mounting import Machine, Server, wait_until

from vmfs.host.sandbox import Sandbox

# again: inc word [0x5000]; mov al, [0x5000]; mov [next+1], al; next: add bx, 1 (imm8); loop again; hlt; jmp $-1
CODE = "b90010 ff060050 a00050 a20e10 83c301 e2f2 f4 ebfd"


@pytest.fixture
def quiet(own_server) -> Iterator[Server]:
    yield own_server()


def parent_of(server: Server) -> Machine:
    vm = B.makes(server.path / "parent")
    B.does(vm.load, CODE)
    B.does(os.mkdir, vm / "snap" / "ready")
    return vm


def fork(vm: Machine, name: str) -> Machine:
    B.does(vm.write, "fork", f"{name} from ready\n")
    return Machine(vm.path.parent / name)


def filters(pid: int) -> str:
    return word_of(pid, "Seccomp_filters")


def templates(server: Server) -> list[int]:
    """Templates (two filters), and forks that nobody has yet (with the third); a process with less is a spare."""
    known = {int(line.rpartition("=")[2]) for line in (server.path / "machines").read_text().splitlines()}
    found = [pid for pid in children(zygote_of(server)) if word_of(pid, "Name") == "vmfs-machine"]
    return [pid for pid in found if pid not in known and filters(pid) in ("2", "3")]


def ready(server: Server) -> list[int]:
    return [pid for pid in templates(server) if filters(pid) == "3"]


def with_template(server: Server) -> Machine:
    vm = parent_of(server)
    for name in ("first", "second"):
        assert B.does(fork(vm, name).run).startswith("hlt ")
    wait_until(lambda: len(ready(server)) == 2, "forks are ready")
    return vm


def state_of(vm: Machine) -> tuple[str, str]:
    return vm.read("registers"), hashlib.sha256((vm / "mem").read_bytes()[: 1 << 20]).hexdigest()


def test_the_third_is_there_before_it_is_asked_for(quiet):
    vm = with_template(quiet)
    waiting = ready(quiet)
    pid = pid_of(fork(vm, "third"))
    assert pid in waiting
    facts = status(pid)
    assert facts["PPid"].strip() == str(zygote_of(quiet))
    assert facts["Uid"].split() == [str(B.uid)] * 4 and facts["Gid"].split() == [str(B.uid)] * 4
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[kind], 16) == 0, kind
    assert facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "2" and os.listdir(f"/proc/{pid}/root/") == []
    for name in ("net", "ipc", "uts", "mnt", "pid"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    wait_until(lambda: len(ready(quiet)) == 2, "another one is ready")
    assert not set(waiting) - {pid} - set(ready(quiet))


def test_what_they_have_rehearsed_nobody_sees(quiet):
    def seen(vm: Machine) -> dict[str, str]:
        files = {name: vm.read(name) for name in ("state", "exit", "registers", "debug", "error")}
        counted = ("runs", "exits.", "run_time_us", "instructions", "interrupts")
        lines = [line for line in vm.read("stat").splitlines() if line.startswith(counted)]
        return {**files, "stat": "\n".join(sorted(lines))}

    vm = parent_of(quiet)
    usual = seen(fork(vm, "usual"))
    assert "runs 0" in usual["stat"] and "run_time_us 0" in usual["stat"]
    B.does(fork(vm, "second").run)
    wait_until(lambda: len(ready(quiet)) == 2, "forks are ready")
    waiting = ready(quiet)
    third = fork(vm, "third")
    assert seen(third) == usual and pid_of(third) in waiting
    assert B.does(third.run).startswith("hlt ")


def test_they_share_nothing_that_one_of_them_can_write(quiet):
    vm = with_template(quiet)
    forks = [fork(vm, f"f{number}") for number in range(3)]
    for one in forks:
        one.load("40 ebfd")
        B.does(one.write, "vm_run", "insns 1000000\n")  # often enough to be translated
    pids = [pid_of(one) for one in forks]
    maps = [[line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()] for pid in pids]
    shared = [{(words[3], words[4]) for words in some if words[1] == "rw-s"} for some in maps]
    assert not shared[0] & shared[1] and not shared[1] & shared[2] and not shared[0] & shared[2]
    links = [{os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")} for pid in pids]
    sockets = [{one for one in some if one.startswith("socket:")} for some in links]
    assert all(map(len, sockets)) and len(set.union(*sockets)) == sum(map(len, sockets))
    polls = [{one for one in some if "eventpoll" in one} for some in links]
    assert all(len(one) == 1 for one in polls)


def merged(pid: int) -> dict[str, bool]:
    """Whether the kernel may merge pages of each mapping that a process may write, by what it is of."""
    found: dict[str, bool] = {}
    rights = name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split(None, 5)
        if not head.endswith(":"):
            rights, name = rest[0], rest[4] if len(rest) > 4 else ""
        elif head == "VmFlags:" and rights == "rw-p":
            found[name] = found.get(name, False) or " mg" in line
    return found


@pytest.mark.skipif(not Path("/sys/kernel/mm/ksm").exists(), reason="this kernel has no KSM")
def test_what_is_the_processes_own_may_be_merged_and_what_is_a_guests_not(quiet):
    vm = with_template(quiet)
    third = fork(vm, "third")
    assert B.does(third.run).startswith("hlt ")
    may_be = merged(pid_of(third))
    assert may_be["[heap]"] and may_be[""]
    guests = [name for name in may_be if name.startswith("/memfd:")]
    assert guests and not any(may_be[name] for name in guests)
    assert not any(merged(pid_of(vm)).values())


def test_they_do_what_one_does_that_nobody_disturbs(quiet):
    """All at the same time, code that changes itself, often enough to be translated."""
    vm = with_template(quiet)
    forks = []
    for number in range(6):
        forks.append(fork(vm, f"f{number}"))
        assert forks[-1].read("state") == "paused\n"
    beside = Machine(quiet.path / "beside")
    B.does(vm.write, "fork", "beside\n")  # of now: by no template
    expected = []
    for _ in range(4):
        assert B.does(beside.run).startswith("hlt ")
        expected.append(state_of(beside))
        beside.write("registers", "rip 0x1000\n")
    assert len({state for _, state in expected}) == 4

    def live(one: Machine) -> list[tuple[str, str]]:
        found = []
        for _ in range(4):
            assert one.run().startswith("hlt ")
            found.append(state_of(one))
            one.write("registers", "rip 0x1000\n")
        return found

    with ThreadPoolExecutor(len(forks)) as callers:
        assert list(callers.map(live, forks)) == [expected] * len(forks)


def test_those_that_are_killed_are_not_missed(quiet):
    vm = with_template(quiet)
    for pid in ready(quiet):
        os.kill(pid, signal.SIGKILL)
    third = fork(vm, "third")
    assert B.does(third.run).startswith("hlt ")
    pid = pid_of(third)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: third.read("state") == "failed\n")
    assert "SIGKILL" in third.read("error")
    assert B.does(fork(vm, "fourth").run).startswith("hlt ")


def test_a_template_that_is_killed_leaves_its_forks_alone(quiet):
    vm = with_template(quiet)
    third = fork(vm, "third")
    pid = pid_of(third)
    wait_until(lambda: (len(templates(quiet)), len(ready(quiet))) == (3, 2), "another one is ready")
    (template,) = (one for one in templates(quiet) if filters(one) == "2")
    os.kill(template, signal.SIGKILL)
    wait_until(lambda: not is_there(template), "it is gone")
    assert is_there(pid) and B.does(third.run).startswith("hlt ")
    for number in range(4):
        assert B.does(fork(vm, f"later{number}").run).startswith("hlt ")


def test_with_what_they_are_made_of_they_are_gone(quiet):
    vm = with_template(quiet)
    third = fork(vm, "third")
    assert pid_of(third)
    B.does(vm.path.rmdir)
    wait_until(lambda: not templates(quiet))
    assert B.does(third.run).startswith("hlt ")


def test_a_snapshot_that_is_another_by_the_same_name(quiet):
    vm = with_template(quiet)
    B.does(vm.run)
    B.does(os.rmdir, vm / "snap" / "ready")
    B.does(os.mkdir, vm / "snap" / "ready")
    expected = state_of(vm)
    for number in range(4):
        assert state_of(fork(vm, f"other{number}")) == expected
        time.sleep(0.1)


def test_the_end_of_the_mount_is_theirs(quiet):
    vm = with_template(quiet)
    third = pid_of(fork(vm, "third"))
    wait_until(lambda: len(ready(quiet)) == 2, "the next fork is made in its place")
    pids = [third, *templates(quiet)]
    assert len(pids) > 3
    quiet.end()
    wait_until(lambda: not any(map(is_there, pids)))


# ---- the sandbox


def as_template(box: Sandbox) -> None:
    box.seclude(multiplies=True)
    box.confine(WHO, multiplies=True)


def as_fork(box: Sandbox) -> None:
    as_template(box)
    box.confine_fork()


OF_A_TEMPLATE = {"prctl-pdeathsig": 0}


def test_what_is_refused_to_a_template():
    answers = inside(all_calls, as_template)
    assert answers == {name: OF_A_TEMPLATE.get(name, 1) for name, _, _ in FORBIDDEN}


def test_what_is_refused_to_its_fork():
    answers = inside(all_calls, as_fork)
    assert answers == {name: 1 for name, _, _ in FORBIDDEN}


def test_a_fork_makes_none_and_sends_signals_to_itself_only():
    def act() -> list[int]:
        own, other = os.getpid(), os.getppid()
        return [
            call(56, (0x0120_8000 | signal.SIGCHLD, 0, 0, 0, 0)),
            call(234, (own, own, 0)),  # tgkill
            call(234, (other, other, 0)),
            call(234, (own | 1 << 32, own, 0)),
            call(72, (0, 8, other)),  # F_SETOWN
            call(72, (0, 15, 0)),  # F_SETOWN_EX
            call(16, (0, 0x8901, 0)),  # FIOSETOWN
            call(16, (0, 0x8902, 0)),  # SIOCSPGRP
        ]

    assert inside(act, as_fork) == [1, 0, 1, 1, 1, 1, 1, 1]


def test_the_keeper_of_their_namespace_has_nothing_of_the_zygotes():
    box = sandbox()
    if not box.keeper:
        pytest.skip(box.layers["namespaces"])
    wait_until(lambda: not os.listdir(f"/proc/{box.keeper}/fd"))
    facts = status(box.keeper)
    assert facts["Seccomp"] == "2" and int(facts["CapBnd"], 16) == 0
