"""Interruptible waits, without a mount: against a request of the test's own, and against real processes."""

import errno
import os
import subprocess
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from vmfs.fs import interrupts
from vmfs.fs.interrupts import Watch, deliverable, interruptible, signalled
from vmfs.words.errors import Interrupted


class FakeRequest:
    """What `_fuse.Request` is to Python; `signal` is what the kernel's FUSE_INTERRUPT makes of it."""

    def __init__(self):
        self.interrupted = False
        self.on_interrupt = None

    def signal(self):
        if not self.interrupted:
            self.interrupted = True
            if self.on_interrupt is not None:
                self.on_interrupt()


@pytest.fixture
def request_(monkeypatch):
    request = FakeRequest()
    monkeypatch.setattr(interrupts, "_fuse", SimpleNamespace(
        current_request=lambda: request, request=lambda unique: request if unique == 2 else None))
    yield request
    assert request.on_interrupt is None


def run(function):
    async def within_time():
        with trio.fail_after(60):
            return await function()

    return trio.run(within_time)


# ---- a request ----

@pytest.mark.parametrize("unique", [None, 2])
def test_a_signal_ends_the_wait(request_, unique):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(signal_later)
            with pytest.raises(Interrupted) as raised:
                async with interruptible(1, unique):
                    await trio.sleep_forever()
            assert raised.value.errno == errno.EINTR

    async def signal_later():
        await trio.testing.wait_all_tasks_blocked()
        request_.signal()

    run(main)


def test_a_signal_before_the_wait_keeps_the_body_from_beginning(request_):
    async def main():
        request_.signal()
        with pytest.raises(Interrupted):
            async with interruptible(1):
                raise AssertionError("the body began")

    run(main)


def test_a_body_that_ends_as_the_signal_comes_keeps_its_result(request_):
    """The signal comes after the last checkpoint of the body, with the result in hand."""
    async def main():
        send, receive = trio.open_memory_channel(1)
        send.send_nowait("line")
        async with interruptible(1) as caller:
            line = await receive.receive()
            request_.signal()
        assert line == "line"
        assert caller.interrupted

    run(main)


def test_a_result_and_a_signal_at_once_lose_nothing(request_):
    """Both come in one step of the loop, in either order: the reader has the line, or it is still there."""
    async def main(signal_first):
        send, receive = trio.open_memory_channel(1)

        async def both():
            await trio.testing.wait_all_tasks_blocked()
            if signal_first:
                request_.signal()
            send.send_nowait("line")
            request_.signal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(both)
            try:
                async with interruptible(1):
                    line = await receive.receive()
            except Interrupted:
                assert signal_first
                line = receive.receive_nowait()
        assert line == "line"

    for signal_first in (True, False):
        request_.interrupted = False
        run(lambda first=signal_first: main(first))


def test_stop_is_called_once_and_the_body_goes_on(request_):
    stops = []

    async def main():
        stopped = trio.Event()

        def stop():
            stops.append("stop")
            stopped.set()

        async def signal_later():
            await trio.testing.wait_all_tasks_blocked()
            request_.signal()
            request_.signal()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(signal_later)
            async with interruptible(1, stop=stop) as caller:
                await stopped.wait()
                await trio.lowlevel.checkpoint()
            return caller.interrupted

    assert run(main) is True
    assert stops == ["stop"]


def test_a_cancellation_from_outside_is_no_signal(request_):
    async def main():
        with trio.CancelScope() as outer:
            async with interruptible(1) as caller:
                outer.cancel()
                await trio.sleep_forever()
        assert outer.cancelled_caught
        assert not caller.interrupted

    run(main)


def test_an_exception_of_the_body_comes_through(request_):
    async def main():
        with pytest.raises(ZeroDivisionError):
            async with interruptible(1):
                request_.signal()
                raise ZeroDivisionError

    run(main)


def test_a_signal_for_an_inner_wait_is_for_the_outer_too(request_):
    async def main():
        async with trio.open_nursery() as nursery:
            with pytest.raises(Interrupted):
                async with interruptible(1) as outer:
                    stopped = trio.Event()
                    nursery.start_soon(signal_later)
                    async with interruptible(1, stop=stopped.set):
                        await stopped.wait()
                    assert outer.interrupted
                    await trio.sleep_forever()

    async def signal_later():
        await trio.testing.wait_all_tasks_blocked()
        request_.signal()

    run(main)


def test_an_inner_wait_that_ended_leaves_the_signal_to_the_outer(request_):
    async def main():
        with pytest.raises(Interrupted):
            async with interruptible(1):
                async with interruptible(1):
                    pass
                request_.signal()
                await trio.sleep_forever()

    run(main)


# ---- the watch, where there is no request ----

@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("unique", [None, 0])
def test_the_watch_sees_that_the_caller_is_killed(sleeper, unique):
    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_later)
            with pytest.raises(Interrupted):
                async with interruptible(sleeper.pid, unique):
                    await trio.sleep_forever()

    async def kill_later():
        await trio.testing.wait_all_tasks_blocked()
        sleeper.kill()      # a zombie from then on, until it is waited for

    run(main)


def test_an_unknown_caller_is_not_watched(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(interrupts, "_BLOCKED", watch)

    async def main():
        async with interruptible(0):
            assert not watch.callers

    run(main)


def test_the_watch_rests_when_nobody_waits(monkeypatch, sleeper):
    watch = Watch()
    monkeypatch.setattr(interrupts, "_BLOCKED", watch)

    async def main():
        for _ in range(2):
            async with interruptible(sleeper.pid) as caller:
                assert watch.running
                await trio.sleep(1)
                assert watch.running and not caller.interrupted
            assert not watch.callers
            await trio.sleep(1)
            assert not watch.running

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_process_that_is_gone_counts_as_signalled(sleeper):
    assert not signalled(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert signalled(sleeper.pid)
    assert not signalled(os.getpid())


def status(state="S (sleeping)", **masks):
    lines = ["Name:\tSigPnd", f"State:\t{state}", "SigQ:\t0/1000"]
    return "\n".join(lines + [f"{name}:\t{mask:016x}" for name, mask in masks.items()] + [""]).encode()


USR1, KILL = 1 << 9, 1 << 8


@pytest.mark.parametrize("expected, text", [
    (False, status(SigPnd=0, ShdPnd=0, SigBlk=0, SigIgn=0)),
    (True, status(SigPnd=USR1, ShdPnd=0, SigBlk=0, SigIgn=0)),
    (True, status(SigPnd=0, ShdPnd=USR1, SigBlk=0, SigIgn=0)),
    (False, status(SigPnd=USR1, ShdPnd=USR1, SigBlk=USR1, SigIgn=0)),
    (False, status(SigPnd=USR1, ShdPnd=0, SigBlk=0, SigIgn=USR1)),
    (True, status(SigPnd=USR1 | KILL, ShdPnd=0, SigBlk=USR1, SigIgn=0)),
    (True, status(SigPnd=KILL, ShdPnd=0, SigBlk=2**64 - 1, SigIgn=2**64 - 1)),
    (True, status(SigPnd=0, ShdPnd=1 << 63, SigBlk=0, SigIgn=0)),
    (True, status(state="Z (zombie)", SigPnd=0, ShdPnd=0, SigBlk=0, SigIgn=0)),
    (True, status(state="X (dead)")),
    (False, b""),
])
def test_which_pending_signals_end_a_wait(expected, text):
    assert deliverable(text) is expected


MASK = st.integers(0, 2**64 - 1)


@given(MASK, MASK, MASK, MASK)
def test_a_signal_is_deliverable_unless_blocked_or_ignored(thread, process, blocked, ignored):
    expected = any(
        (thread >> bit | process >> bit) & 1 and (bit == 8 or not (blocked >> bit | ignored >> bit) & 1)
        for bit in range(64))
    assert deliverable(status(SigPnd=thread, ShdPnd=process, SigBlk=blocked, SigIgn=ignored)) is expected


@pytest.mark.parametrize("call", ["listdir", "open"])
def test_without_a_descriptor_it_is_looked_at_again(monkeypatch, call):
    def fails(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    target = "vmfs.fs.interrupts.os.listdir" if call == "listdir" else "builtins.open"
    with monkeypatch.context() as patched:
        patched.setattr(target, fails)
        found = interrupts.signalled(os.getpid())
    assert found is False
