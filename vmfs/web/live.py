"""What a page sees, as it changes: a WebSocket a page.

The page says what it looks at: all machines, or one, a CPU of it, and its panes, each with what it asks:

    {"watch": {"machine": "demo", "cpu": 0, "panes": {"head": {}, "memory": {"at": "rsp", "size": 256}}}}

It is told what is another thing than before: `{"pane": "head", "data": ...}`, or `"error"` with a sentence,
`{"list": ...}`, and `{"gone": "demo"}`. Nothing else is read, and nothing when nobody looks: a page that is hidden
watches nothing.

A look is a call in a thread, and the next one comes when the page has taken what it found. So a page that is slow gets
fewer looks, there is no queue to grow, and no other page waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from vmfs.web.gate import PROTOCOL
from vmfs.web.panes import CHANGES_BY_ITSELF, PANES, WHILE_IT_RUNS
from vmfs.web.place import Overview, Place, SeenVm, checked
from vmfs.web.threads import Refused, Threads
from vmfs.words.errors import VmfsError

EVERY = 0.25  # seconds between two looks at a machine,
EVERY_LIST = 1.0  # and at all machines
PANES_MOST = 32
LOOKS_MOST = 3  # at a machine that changes each time


def sentence(failure: BaseException) -> str:
    """Why something failed."""
    if isinstance(failure, OSError):
        if failure.errno == errno.EINTR:
            return "it was interrupted"
        return failure.strerror or str(failure)
    return str(failure) or type(failure).__name__


EXPECTED = (OSError, VmfsError, ValueError, KeyError, Refused)


class Watch:
    """One machine as a page looks at it. Not for several threads at the same time."""

    def __init__(self, place: Place, asked: dict[str, Any]) -> None:
        self.name = checked(asked.get("machine"))
        self._place = place
        self._vm: SeenVm | None = None
        self._sent: dict[str, tuple[dict[str, Any], Any]] = {}
        self._looked: dict[str, float] = {}
        self._moment: Any = None
        self.set(asked)

    def set(self, asked: dict[str, Any]) -> None:
        """What the page looks at from now on."""
        cpu, panes = asked.get("cpu", 0), asked.get("panes", {})
        if not isinstance(cpu, int) or not 0 <= cpu < 64 or not isinstance(panes, dict) or len(panes) > PANES_MOST:
            raise ValueError("a CPU is a number, panes are an object")
        if not panes.keys() <= PANES.keys() or not all(isinstance(each, dict) for each in panes.values()):
            raise ValueError("there is no such pane")
        if self._sent and cpu != self.cpu:
            self._sent.clear()
        self.cpu, self.panes = cpu, dict(panes)
        self._sent = {name: sent for name, sent in self._sent.items() if panes.get(name) == sent[0]}

    def close(self) -> None:
        if self._vm is not None:
            self._vm.close()
            self._vm = None

    def look(self) -> list[dict[str, Any]]:
        """The messages. What they show of a machine that stands is of one moment: where it has run, or was written to,
        between two panes, they are read again. OSError where the machine is gone."""
        if self._vm is None:
            self._vm = self._place.open(self.name)
        found: dict[str, tuple[dict[str, Any], tuple[str, Any]]] = {}
        for _ in range(LOOKS_MOST):
            before = self._moment
            self._moment = self._now(self._vm)
            self._read(self._vm, self._moment != before, found)
            if self._moment[0] == "running" or self._now(self._vm) == self._moment:
                break
        messages = []
        for name, (asked, (kind, what)) in found.items():
            has_lines = name == "trace" and kind == "data" and what.get("lines")
            if self._sent.get(name) != (asked, (kind, what)) or has_lines:
                self._sent[name] = asked, (kind, what)
                messages.append({"pane": name, "cpu": self.cpu, kind: what})
        return messages

    @staticmethod
    def _now(vm: SeenVm) -> tuple[str, int, bytes]:
        """Its state, and what is another thing after it has run or was written to."""
        return vm.state, os.stat(os.path.join(vm.path, "registers")).st_mtime_ns, vm.read("exit")

    def _read(self, vm: SeenVm, moved: bool, found: dict[str, tuple[dict[str, Any], tuple[str, Any]]]) -> None:
        """The panes that may be another thing."""
        is_running, now = self._moment[0] == "running", time.monotonic()
        for name, asked in self.panes.items():
            if name == "trace" and name in found:  # what was read is read no second time
                continue
            if name in self._sent:
                if is_running and now - self._looked.get(name, 0) < WHILE_IT_RUNS.get(name, 0):
                    continue
                if not is_running and not moved and name not in CHANGES_BY_ITSELF:
                    continue
            self._looked[name] = now
            try:
                found[name] = asked, ("data", PANES[name](vm, self.cpu, asked))
            except EXPECTED as failure:
                if isinstance(failure, OSError) and failure.errno == errno.ENODEV:
                    raise
                found[name] = asked, ("error", sentence(failure))


class Live:
    """One page's WebSocket."""

    def __init__(self, socket: WebSocket, place: Place, threads: Threads) -> None:
        self._socket, self._place, self._threads = socket, place, threads
        self._asked: dict[str, Any] = {}
        self._news = asyncio.Event()

    async def serve(self) -> None:
        await self._socket.accept(PROTOCOL)
        looking = asyncio.create_task(self._look())
        try:
            while True:
                message = json.loads(await self._socket.receive_text())
                self._asked = message["watch"] if isinstance(message["watch"], dict) else {}
                self._news.set()
        except WebSocketDisconnect:
            pass
        except (ValueError, KeyError, TypeError):
            await self._close(1008, "a message is JSON, an object with `watch`")
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking

    async def _close(self, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.close(code, reason)

    async def _look(self) -> None:
        watch: Watch | None = None
        overview: Overview | None = None
        rows: Any = None
        busy: asyncio.Future[Any] | None = None
        try:
            while True:
                self._news.clear()
                asked, messages, pause = self._asked, [], None
                try:
                    if asked.get("list"):
                        overview = overview or Overview(self._place)
                        busy = asyncio.ensure_future(self._threads.call("", overview.look))
                        found = await asyncio.shield(busy)
                        if found != rows:
                            rows = found
                            messages.append({"list": rows, "mount": str(self._place.path)})
                        pause = EVERY_LIST
                    elif overview is not None:
                        self._threads.later(overview.close)
                        overview = rows = None
                    if asked.get("machine"):
                        if watch is None or watch.name != asked["machine"]:
                            if watch is not None:
                                self._threads.later(watch.close)
                            watch = Watch(self._place, asked)
                        watch.set(asked)
                        busy = asyncio.ensure_future(self._threads.call(watch.name, watch.look))
                        messages += await asyncio.shield(busy)
                        pause = EVERY
                    elif watch is not None:
                        self._threads.later(watch.close)
                        watch = None
                except EXPECTED as failure:
                    if isinstance(failure, Refused):
                        messages.append({"busy": sentence(failure)})
                    elif isinstance(failure, OSError) and failure.errno in (errno.ENOENT, errno.ENODEV):
                        reason = "it was removed" if failure.errno == errno.ENODEV else sentence(failure)
                        messages.append({"gone": str(asked.get("machine")), "reason": reason})
                        self._asked = {key: value for key, value in asked.items() if key != "machine"}
                    else:
                        messages.append({"failed": sentence(failure)})
                    pause = EVERY_LIST
                for message in messages:
                    await self._socket.send_text(json.dumps(message))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), pause)
        except (WebSocketDisconnect, RuntimeError):  # it is gone
            pass
        finally:
            for each in (watch, overview):
                if each is not None and busy is not None and not busy.done():  # a thread uses the descriptors still
                    busy.add_done_callback(lambda _, close=each.close: self._threads.later(close))
                elif each is not None:
                    self._threads.later(each.close)
