"""Cases on a cluster: each has one result, and one that goes wrong costs itself only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

import pytest
from fleet.conftest import COUNT, alive, count
from mounting import failing, wait_until

from vmfs import Machine
from vmfs.fleet.processes import TOKEN
from vmfs.words.errors import Invalid


def test_each_input_has_one_result(fleet, counting):
    results = list(fleet.map(count, range(1, 301), template=counting, coverage=1 << 10))
    assert sorted(result.number for result in results) == list(range(300))
    for result in results:
        assert (result.kind, result.input, result.value) == ("", result.number + 1, result.number + 1)
        assert result.exit.startswith("hlt rip=0x") and result.seconds > 0 and result.worker
        assert len(result.coverage) == 1 << 10 and any(result.coverage)


def test_what_a_case_leaves_the_next_does_not_see(fleet, counting):
    def dirty(machine, number):
        seen = (machine.rax, bytes(machine.mem[0x1000:0x1010]), os.listdir("."), len(machine._hooks))
        machine.hook_code(lambda machine, address: True)
        machine.mem[0x1000:] = os.urandom(16)
        machine.rax = number
        with open("left", "w") as file:
            file.write("x")
        print("said", number)
        if number % 3 == 0:
            machine.close()
        if number % 3 == 1:
            raise KeyError(number)
        return seen

    results = list(fleet.map(dirty, range(12), template=counting, batch=12))
    assert [result.kind for result in results] == ["", "raised", ""] * 4
    assert all(result.output == f"said {result.number}\n" for result in results)
    seen = {result.value for result in map(frozen, results) if not result.kind}
    assert seen == {(0, COUNT + bytes(16 - len(COUNT)), (), 0)}


def frozen(result):
    if result.value is not None:
        rax, code, names, hooks = result.value
        object.__setattr__(result, "value", (rax, code, tuple(names), hooks))
    return result


def misbehave(machine, what):
    if what == "raise":
        raise ValueError("no such thing")
    if what == "hang":
        while True:
            time.sleep(1)
    if what == "guest hangs":
        machine.mem[0x1000:] = b"\xeb\xfe"
        machine.run()
    if what == "exit":
        os._exit(7)
    if what == "crash":
        ctypes.string_at(0)
    if what == "memory":
        kept = [b"x" * (1 << 20) for _ in range(400)]
        time.sleep(50)
        return len(kept)
    if what == "disk":
        for number in range(20):
            with open(f"f{number}", "wb") as file:
                file.write(bytes(8 << 20))
        time.sleep(50)
    if what == "files without a name":
        for name in ("f", "g"):
            file = os.open(name, os.O_WRONLY | os.O_CREAT)
            os.unlink(name)
            os.write(file, bytes(60 << 20))
        time.sleep(50)
    if what == "a large file":
        with open("f", "wb") as file:
            file.write(bytes(120 << 20))
    if what == "fork":
        os.fork()
        return what
    if what == "bomb":
        while True:
            os.fork()
    if what == "leave":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.waitpid(pid, 0)
        return what
    if what == "lambda":
        return lambda: what
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "sys.exit":
        sys.exit(3)
    return what


EXPECTED = {
    "raise": ("raised", "ValueError: no such thing"),
    "hang": ("timeout", "not done after 2 s"),
    "guest hangs": ("timeout", "not done after 2 s"),
    "exit": ("died", "exit code 7"),
    "crash": ("died", "ended"),
    "memory": ("memory", "bytes in memory"),
    "disk": ("disk", "its files have"),
    "files without a name": ("disk", "its files have"),
    "a large file": ("raised", "File too large"),
    "fork": ("", ""),
    "bomb": ("processes memory timeout", ""),
    "leave": ("", ""),
    "lambda": ("value", "return plain data"),
    "interrupt": ("raised", "KeyboardInterrupt"),
    "sys.exit": ("raised", "SystemExit"),
}


def test_a_case_costs_itself_only(fleet, client, counting):
    inputs = [word for what in EXPECTED for word in (what, "fine")]
    options = {"template": counting, "timeout": 2, "memory": 300 << 20, "disk": 100 << 20, "batch": 7}
    results = sorted(fleet.map(misbehave, inputs, **options), key=lambda result: result.number)
    assert [result.input for result in results] == inputs
    for result in results:
        kinds, sentence = EXPECTED.get(result.input, ("", ""))
        if result.kind == "timeout" and result.input in ("disk", "memory", "files without a name"):
            continue  # of a host that is so slow that it did not come so far
        assert result.kind in kinds.split(" ") and sentence in result.error, result
        assert result.value == (None if result.kind else result.input)
    tokens = set(client.run(token_of, fleet.name).values())
    (runner,) = fleet.map(lambda machine, _: os.environ.get(TOKEN), [0], template=counting)
    assert runner.value.partition("-")[0] in tokens, "runners, and what they start, are known by that"
    marks = [f"{TOKEN}={token}".encode() for token in tokens]
    there = [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if any(has(pid, mark) for mark in marks)]
    assert not [pid for pid in there if "sleep" in state(pid)]


def token_of(fleet, dask_worker):
    return dask_worker.plugins[fleet]._token


def has(pid: str, token: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return token in file.read()
    except OSError:
        return False


def state(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read()
    except OSError:
        return ""


def test_a_worker_that_is_killed_costs_no_case(fleet, cluster, client, counting, root):
    def slow(machine, number):
        time.sleep(0.03)
        return count(machine, number)

    nanny, results = next(iter(cluster.workers.values())), []
    killed = nanny.pid
    for result in fleet.map(slow, range(1, 61), template=counting, batch=2):
        results.append(result)
        if len(results) == 10:
            os.kill(killed, signal.SIGKILL)
    assert sorted(result.number for result in results) == list(range(60))
    assert all(result.value == result.input for result in results), [r for r in results if r.kind]
    wait_until(lambda: not alive(killed))
    wait_until(lambda: not list(root.glob(f"work-{killed}-*")), "what it had is gone")
    wait_until(lambda: nanny.status.name == "running" and nanny.pid != killed, "there is another one")
    client.wait_for_workers(2, timeout=60)


def test_a_template_is_fetched_once_a_host(fleet, client, root):
    with Machine(memory={0x1000: COUNT, 0x10_0000: os.urandom(9 << 20)}) as machine:
        template = fleet.template(machine)
    assert len(template.manifest.chunks) == 3
    before = {path: os.stat(path).st_ino for path in root.glob("*/data")}
    results = list(fleet.map(lambda machine, number: machine.mem[0x10_0000 + number], range(8), template=template))
    assert all(not result.kind for result in results) and len({result.worker for result in results}) == 2
    new = [path for path in root.glob("*/data") if path not in before]
    assert [path.parent.name for path in new] == [template.id]
    inode = os.stat(new[0]).st_ino
    list(fleet.map(lambda machine, number: number, range(8), template=template))
    assert os.stat(new[0]).st_ino == inode


def pages_of(machine, _):
    """Of the runner: what it has of the template's memory, and its part of that, as the kernel counts it."""
    size = sum(machine.mem.read(at, 4096) == b"" for at in range(0x10_0000, 0x10_0000 + (8 << 20), 4096))
    found, name = {"Rss": 0, "Pss": 0, "Anonymous": 0}, ""
    with open("/proc/self/smaps") as file:
        for line in file:
            word = line.split()[0]
            if not word.endswith(":"):
                name = line
            elif "vmfs-fleet-" in name and word[:-1] in found:
                found[word[:-1]] += int(line.split()[1]) << 10
    time.sleep(0.5)  # so that the other worker has a case, too
    return size, found


def test_workers_of_a_host_share_the_pages_of_a_template(fleet):
    with Machine(memory={0x1000: COUNT}) as machine:
        machine.map(0x10_0000, os.urandom(8 << 20))
        template = fleet.template(machine)
    for _ in range(2):  # in the second round both runners have them
        results = list(fleet.map(pages_of, range(6), template=template, batch=1))
        assert not any(result.kind for result in results), results
        assert len({result.worker for result in results}) == 2
    for result in results:
        size, found = result.value
        assert not size and found["Rss"] >= 8 << 20 and found["Anonymous"] < 1 << 20, found
        assert found["Pss"] < 0.6 * found["Rss"], found


def without_fuse(does):
    from vmfs.client.mounting import MountFailed, private_mount
    from vmfs.fleet import worker

    def refuse(*_, **__):
        raise MountFailed("/dev/fuse does not exist")

    worker.private_mount = refuse if does else private_mount


def test_a_machine_of_a_mount(fleet, client, counting, tmp_path):
    from vmfs.client import MountFailed, Vm, private_mount
    from vmfs.commands import archive

    def work(vm, number):
        vm.regs.rcx = number
        vm.run()
        if number == 4:
            raise ValueError
        return vm.regs.rax

    endless = 1 << 60
    with contextlib.ExitStack() as stack:
        try:
            mount = stack.enter_context(private_mount(["--engine", "emulator"]))
        except MountFailed as failure:
            pytest.skip(str(failure))
        with Vm.create(mount / "one", mem_size="8M", mode="long", time="instructions") as vm:
            vm.write_mem(0x1000, COUNT)
            vm.regs.rip = 0x1000
            template = fleet.template(vm)
            assert vm.snapshots == []
        client.run(without_fuse, True)
        try:
            (none,) = fleet.map(work, [2], template=template)
            (library,) = fleet.map(count, [2], template=counting)
        finally:
            client.run(without_fuse, False)
        assert (none.kind, library.value) == ("template", 2)
        assert none.error == "this worker has no mount, which a saved machine needs: /dev/fuse does not exist"
        options = {"template": template, "keep": tmp_path / "kept", "history": 64 << 20}
        good, raised = sorted(fleet.map(work, [2, 4], **options), key=lambda result: result.input)
        (late,) = fleet.map(work, [endless], **options, timeout=1.5)
        assert (good.kind, good.value, good.exit, good.saved) == ("", 2, "hlt rip=0x1009", None)
        assert (raised.kind, raised.value) == ("raised", None) and "ValueError" in raised.error
        assert (late.kind, late.exit) == ("timeout", "interrupted rip=0x1000")
        assert not raised.note and not late.note
        for name, result in (("raised", raised), ("late", late)):
            with open(result.saved, "rb") as source:
                archive.load(mount / name, source, "kept", result.saved.stat().st_size)
        with Vm(mount / "raised") as vm:
            assert (vm.regs.rax, vm.regs.rcx, vm.regs.rip) == (4, 0, 0x1009)
            vm.back(4)  # hlt, jne, dec, inc
            assert (vm.regs.rax, vm.regs.rcx, vm.regs.rip) == (3, 1, 0x1000)
            vm.back(3)
            assert (vm.regs.rax, vm.regs.rcx, vm.regs.rip) == (2, 2, 0x1000)
        with Vm(mount / "late") as vm:
            at = vm.regs.rax
            vm.back(3000)
            assert at > 1000 and vm.regs.rax == at - 1000 and vm.regs.rcx == endless - vm.regs.rax


def test_a_machine_that_is_too_long_is_not_kept(fleet, counting, tmp_path):
    options = {"template": counting, "keep": tmp_path}
    (result,) = fleet.map(lambda machine, number: 1 // number, [0], **options, keep_most=100)
    assert (result.kind, result.saved) == ("raised", None)
    assert result.note == "its machine was not kept: it comes to more than 100 bytes"
    (result,) = fleet.map(lambda machine, number: 1 // number, [0], **options)
    assert result.saved == tmp_path / "case-0.vmfs" and result.note == ""
    with pytest.raises(Invalid, match="needs `keep`, and a template"):
        fleet.map(count, [1], **options, history=1 << 20)


def test_long_results_come_in_several_tasks(fleet, client, counting):
    def bound(most):
        from vmfs.fleet import worker

        before, worker._RESULTS_MOST = worker._RESULTS_MOST, most
        return before

    before = set(client.run(bound, 50).values())
    try:
        results = list(fleet.map(lambda machine, number: bytes(40), range(3), template=counting, batch=3))
    finally:
        client.run(bound, *before)
    assert sorted(result.number for result in results) == list(range(3))
    assert all(result.value == bytes(40) for result in results)


def test_a_client_that_reaches_no_worker_sends_by_the_scheduler(fleet, client, monkeypatch):
    asked = []

    def refuses(address):
        asked.append(address)
        raise OSError("no route")

    with Machine(memory={0x1000: COUNT, 0x10_0000: os.urandom(5 << 20)}) as machine:
        machine.rip = 0x1000
        template = fleet.template(machine)
    assert len(template.manifest.chunks) == 2
    monkeypatch.setattr(client, "rpc", refuses)
    monkeypatch.setattr(fleet, "_near", set())
    monkeypatch.setattr(fleet, "_far", set())
    results = list(fleet.map(count, range(1, 5), template=template))
    assert sorted(result.value for result in results) == [1, 2, 3, 4]
    assert len(asked) == 1 and fleet._far == {*asked}  # it is asked by the scheduler from then on


def test_what_is_no_template_has_a_sentence(fleet, tmp_path):
    (tmp_path / "file").write_bytes(b"nothing")
    (tmp_path / "folder").mkdir()
    for what in ("file", "folder"):
        with pytest.raises(Invalid, match="is no "):
            fleet.template(tmp_path / what)
    assert failing(fleet.template, tmp_path / "missing")


def test_a_damaged_machine_of_the_library(tmp_path):
    with Machine(memory={0x1000: COUNT}) as machine:
        machine.rip, machine.rcx = 0x1000, 5
        data = machine.save()
    with Machine.load(data) as again:
        again.run()
        assert again.rax == 5
    for wrong in (b"", data[:-1], data[:20], data[:50] + b"x" + data[51:], data[:15] + bytes(100)):
        with pytest.raises(Invalid, match="saved machine"):
            Machine.load(wrong)
