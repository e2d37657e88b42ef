"""The hooks in front of libfuse, on a real mount of a small file system of this file's own.

Run as a program, this file is that file system: `test_fuse_hooks.py DIR` mounts it and serves it. Its files:

    block       a read waits until a byte is written to `release`, and tells "released"
    late        the same, but the handler first waits for a byte in `gate`, where no signal reaches it
    stop        a read waits with stop=: it ends with "stopped" if the signal's stop() ended it
    waiting.N   a read returns as soon as N reads of the three above wait, no more, no less
    quiet       a poll finds it not ready
    caller      a read tells who reads, a write is kept: `writer` tells who wrote
    mem         a memfd, passed through where that is possible; with O_DIRECT only its mappings are
    plain       8 bytes
    status      what the hooks say, and how many reads and writes of `mem` reached the server, as JSON; and
                how many Requests there are
    refused     what wrong calls of the passthrough functions raise, as JSON
"""

import ctypes
import errno
import fcntl
import gc
import itertools
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZE = 1 << 20
SOON = 60
"""Seconds after which something has not happened: far more than anything here takes on a busy machine."""

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse is not accessible"),
    pytest.mark.skipif(not shutil.which("fusermount3"), reason="fusermount3 is not installed"),
]


# ---- the file system ----

NAMES = ["block", "release", "late", "gate", "stop", "quiet", "caller", "writer", "mem", "plain", "status",
         "refused"]


def drop_sys_admin():
    """Gives CAP_SYS_ADMIN up, as a user's own mount has none: it is then mounted by fusermount3."""
    libc = ctypes.CDLL(None, use_errno=True)
    capget, capset, sys_admin, version = 125, 126, 21, 0x20080522
    header = (ctypes.c_uint32 * 2)(version, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the same of capabilities from 32
    for number in (capget, capset):
        if libc.syscall(number, header, data) < 0:
            raise OSError(ctypes.get_errno(), "capget, capset")
        for word in range(3):
            data[word] &= ~(1 << sys_admin)


def serve(directory):
    import trio

    from vmfs.fs.hooks import _fuse, pyfuse3, status
    from vmfs.fs.interrupts import interruptible
    from vmfs.fs.passthrough import Backing
    from vmfs.words.errors import VmfsError

    class Files(pyfuse3.Operations):
        def __init__(self):
            super().__init__()
            self.memory = os.memfd_create("mem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.memory, SIZE)
            self.backing = Backing(self.memory)
            self.served = {"read": 0, "write": 0}
            self.events = {"release": trio.Event(), "gate": trio.Event()}
            self.waiting, self.changed = 0, trio.Condition()
            self.writer = None
            self.opened, self.handles = {}, itertools.count(1)

        @staticmethod
        def name(inode):
            number = inode - pyfuse3.ROOT_INODE - 1
            return NAMES[number] if number < len(NAMES) else f"waiting.{number - len(NAMES)}"

        async def getattr(self, inode, ctx=None):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            entry.attr_timeout = entry.entry_timeout = 0
            if inode == pyfuse3.ROOT_INODE:
                entry.st_mode = stat.S_IFDIR | 0o755
            else:
                entry.st_mode = stat.S_IFREG | 0o644
                entry.st_size = os.fstat(self.memory).st_size if self.name(inode) == "mem" else 0
            return entry

        async def lookup(self, parent, name, ctx):
            name = os.fsdecode(name)
            if name in NAMES:
                number = NAMES.index(name)
            elif name.startswith("waiting."):
                number = len(NAMES) + int(name.partition(".")[2])
            else:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(pyfuse3.ROOT_INODE + 1 + number)

        async def setattr(self, inode, attr, fields, fh, ctx):
            if fields.update_size and self.name(inode) == "mem":
                try:
                    os.ftruncate(self.memory, attr.st_size)
                except OSError as error:
                    raise pyfuse3.FUSEError(error.errno) from None
            return await self.getattr(inode)

        async def unlink(self, parent, name, ctx):
            pass

        async def open(self, inode, flags, ctx):
            name = self.name(inode)
            fh = next(self.handles)
            self.opened[fh] = (name, ctx.pid)
            if name != "mem":
                return pyfuse3.FileInfo(fh=fh, direct_io=True)
            await trio.lowlevel.checkpoint()
            passes = self.backing.answer_open()
            return pyfuse3.FileInfo(fh=fh, keep_cache=True, direct_io=passes and bool(flags & os.O_DIRECT))

        async def read(self, fh, offset, size):
            name, pid = self.opened[fh]
            try:
                return await self.content(name, pid, offset, size)
            except VmfsError as error:
                raise pyfuse3.FUSEError(error.errno) from None

        async def content(self, name, pid, offset, size):
            if name == "mem":
                self.served["read"] += 1
                return os.pread(self.memory, size, offset)
            if offset:
                return b""
            if name == "plain":
                return b"8 bytes\n"
            if name in ("block", "late"):
                async with Counted(self):
                    unique = _fuse.current_unique()
                    if name == "late":
                        with trio.CancelScope(shield=True):
                            await self.events["gate"].wait()
                    async with interruptible(pid, unique):
                        await self.events["release"].wait()
                return b"released\n"
            if name == "stop":
                enough = trio.Event()
                async with Counted(self), interruptible(pid, stop=enough.set) as caller:
                    await enough.wait()
                return b"stopped\n" if caller.interrupted else b"ended\n"
            if name == "caller":
                request = _fuse.current_request()
                await trio.lowlevel.checkpoint()
                assert request is _fuse.current_request()
                return json.dumps([request.pid, request.uid, request.gid]).encode()
            if name == "writer":
                return json.dumps(self.writer).encode()
            if name == "status":
                gc.collect()
                requests = sum(type(each) is _fuse.Request for each in gc.get_objects())
                return json.dumps(vars(status()) | self.served | {"requests": requests}).encode()
            if name == "refused":
                return json.dumps(self.refused()).encode()
            wanted = int(name.partition(".")[2])
            async with self.changed:
                while self.waiting != wanted:
                    await self.changed.wait()
            return b"so many\n"

        def refused(self):
            pipe = os.pipe()
            root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
            calls = {
                "no descriptor": lambda: _fuse.backing_open(-1),
                "a directory": lambda: _fuse.backing_open(root),
                "a pipe": lambda: _fuse.backing_open(pipe[0]),
                "no id": lambda: _fuse.backing_close(1 << 30),
                "twice": lambda: [_fuse.backing_close(id_) for id_ in [_fuse.backing_open(self.memory)] * 2],
                "not in an open": lambda: _fuse.passthrough_next_open(1),
                "no request": lambda: _fuse.passthrough_open(1, 1),
                "a negative id": lambda: _fuse.passthrough_open(_fuse.current_unique(), -1),
            }
            raised = {}
            for what, call in calls.items():
                try:
                    call()
                except OSError as error:
                    raised[what] = errno.errorcode[error.errno]
                except ValueError:
                    raised[what] = "ValueError"
            for descriptor in (root, *pipe):
                os.close(descriptor)
            return raised

        async def write(self, fh, offset, data):
            name, _ = self.opened[fh]
            if name == "mem":
                self.served["write"] += 1
                data = data[:max(0, os.fstat(self.memory).st_size - offset)]
                if not data:
                    raise pyfuse3.FUSEError(errno.EFBIG)
                return os.pwrite(self.memory, data, offset)
            if name == "caller":
                request = _fuse.current_request()
                self.writer = [request.pid, request.uid, request.gid, len(data)]
            elif name in self.events:
                self.events[name].set()
                self.events[name] = trio.Event()
            return len(data)

        async def poll(self, inode, fh, handle, ctx):
            return 0

        async def release(self, fh):
            del self.opened[fh]

    class Counted:
        """Counts the reads that wait. It ends with one that is cancelled, too."""

        def __init__(self, files):
            self.files = files

        async def __aenter__(self):
            await self.add(1)

        async def __aexit__(self, *exception):
            await self.add(-1)

        async def add(self, number):
            with trio.CancelScope(shield=True):
                async with self.files.changed:
                    self.files.waiting += number
                    self.files.changed.notify_all()

    if os.environ.get("TEST_DROP_SYS_ADMIN") == "1":
        drop_sys_admin()
    files = Files()
    pyfuse3.init(files, directory, {*pyfuse3.default_options, "fsname=vmfs-hooks-test"})
    print(json.dumps({"memory": files.memory}), flush=True)
    try:
        trio.run(lambda: pyfuse3.main(max_tasks=1000))
    finally:
        pyfuse3.close()


# ---- the mounts ----

class Mount:
    """A mount of the above, in a process of its own."""

    def __init__(self, path, environment):
        self.path = path
        self.server = subprocess.Popen(
            [sys.executable, __file__, path], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)} | os.environ | environment)
        ready = self.server.stdout.readline()
        assert ready, f"the server ended with {self.server.wait()}"
        self.memory = f"/proc/{self.server.pid}/fd/{json.loads(ready)['memory']}"

    def __truediv__(self, name):
        return self.path / name

    def status(self):
        return json.loads((self / "status").read_text())

    def wait_for(self, readers):
        """Until so many reads wait in the server."""
        assert (self / f"waiting.{readers}").read_text() == "so many\n"

    def write(self, name):
        (self / name).write_bytes(b"1")

    def end(self):
        # Nothing may be left that waits for an answer: the connection is aborted, then unmounted.
        if self.server.poll() is None:
            self.server.terminate()
        try:
            self.server.wait(5)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait(SOON)
        self.server.stdout.close()
        subprocess.run(["fusermount3", "-uqz", self.path], check=False)


@contextmanager
def mounted(path, **environment):
    path.mkdir()
    mount = Mount(path, environment)
    try:
        yield mount
    finally:
        mount.end()


WAYS = {"hooks": {}, "watch": {"VMFS_NO_FUSE_HOOKS": "1"}}
"""How a signal for a caller is seen."""


@pytest.fixture(scope="module", params=WAYS)
def mount(request, tmp_path_factory):
    with mounted(tmp_path_factory.mktemp("mount") / "files", **WAYS[request.param]) as mount:
        assert mount.status()["interrupts"] == (request.param == "hooks")
        yield mount


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
    with mounted(tmp_path_factory.mktemp("hooked") / "files") as mount:
        yield mount


@pytest.fixture
def passing(hooked):
    status = hooked.status()
    if not status["passthrough"]:
        pytest.skip(f"no passthrough: {status['passthrough_reason']}")
    return hooked


@contextmanager
def reader(path):
    """A process whose only thread waits in a read of the file."""
    process = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait(SOON)


@contextmanager
def program(body, *arguments):
    """A Python process that runs CALLS and the body, with pipes for its standard input and output."""
    process = subprocess.Popen([sys.executable, "-u", "-c", CALLS + body, *map(str, arguments)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


CALLS = """
import ctypes, errno, mmap, os, signal, sys, threading

libc = ctypes.CDLL(None, use_errno=True)

def read(descriptor):
    # One system call: Python's own would be made again after EINTR.
    data = ctypes.create_string_buffer(64)
    size = libc.read(descriptor, data, 64)
    return errno.errorcode[ctypes.get_errno()] if size < 0 else data.raw[:size].decode().strip()
"""


# ---- signals ----

def test_kill_ends_a_blocked_reader_at_once(mount):
    with reader(mount / "block") as cat:
        mount.wait_for(1)
        cat.kill()
        assert cat.wait(SOON) == -signal.SIGKILL
        mount.wait_for(0)


def test_a_fatal_signal_ends_a_blocked_reader(mount):
    with reader(mount / "block") as cat:
        mount.wait_for(1)
        cat.send_signal(signal.SIGTERM)
        assert cat.wait(SOON) == -signal.SIGTERM
        mount.wait_for(0)


def test_without_a_signal_nothing_is_interrupted(mount):
    with reader(mount / "block") as cat:
        mount.wait_for(1)
        mount.write("release")
        assert cat.stdout.read() == b"released\n"
        assert cat.wait(SOON) == 0


HANDLED = """
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, sys.argv[2] == "interrupt")
descriptor = os.open(sys.argv[1], os.O_RDONLY)
print(read(descriptor))
print(read(descriptor))
"""


@pytest.mark.parametrize("restart", ["interrupt", "restart"])
def test_a_handled_signal_is_eintr_and_the_next_call_goes_on(mount, restart):
    """SA_RESTART makes no difference: FUSE has no answer that would restart the call."""
    with program(HANDLED, mount / "block", restart) as caller:
        mount.wait_for(1)
        caller.send_signal(signal.SIGUSR1)
        assert caller.stdout.readline() == "EINTR\n"
        mount.wait_for(1)
        mount.write("release")
        assert caller.stdout.readline() == "released\n"


def test_a_stopped_cat_goes_on(mount):
    """cat calls read again after EINTR."""
    with reader(mount / "block") as cat:
        mount.wait_for(1)
        cat.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, cat.pid, os.WSTOPPED)
        mount.wait_for(0)
        cat.send_signal(signal.SIGCONT)
        mount.wait_for(1)
        mount.write("release")
        assert cat.stdout.read() == b"released\n"


IGNORED = """
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
print(read(os.open(sys.argv[1], os.O_RDONLY)))
"""


def test_ignored_and_blocked_signals_interrupt_nothing(mount):
    with program(IGNORED, mount / "block") as caller:
        mount.wait_for(1)
        caller.send_signal(signal.SIGUSR1)
        caller.send_signal(signal.SIGUSR2)
        with reader(mount / "block") as cat:    # by the time this one has seen its signal, so had the other
            mount.wait_for(2)
            cat.send_signal(signal.SIGTERM)
            cat.wait(SOON)
        mount.wait_for(1)
        mount.write("release")
        assert caller.stdout.readline() == "released\n"


def test_a_signal_before_the_wait_began_ends_it(mount):
    """The one interrupt message comes while the handler is busy with something else."""
    with reader(mount / "late") as cat:
        mount.wait_for(1)
        cat.kill()
        with reader(mount / "block") as other:  # as above: an event after the signal
            mount.wait_for(2)
            other.kill()
            other.wait(SOON)
        mount.wait_for(1)
        assert cat.poll() is None
        mount.write("gate")
        assert cat.wait(SOON) == -signal.SIGKILL
        mount.wait_for(0)


def test_stop_ends_the_body_and_its_result_is_kept(mount):
    with program(HANDLED, mount / "stop", "interrupt") as caller:
        mount.wait_for(1)
        caller.send_signal(signal.SIGUSR1)
        assert caller.stdout.readline() == "stopped\n"


def test_two_hundred_blocked_readers_are_killed(mount):
    readers = [subprocess.Popen(["cat", mount / "block"], stdout=subprocess.DEVNULL) for _ in range(200)]
    try:
        mount.wait_for(200)
        assert (mount / "plain").read_bytes() == b"8 bytes\n"
    finally:
        for cat in readers:
            cat.kill()
        for cat in readers:
            assert cat.wait(SOON) == -signal.SIGKILL
    mount.wait_for(0)


THREADS = """
signal.signal(signal.SIGUSR1, lambda *_: None)
answers = {}

def call(name):
    answers[name] = read(os.open(sys.argv[1], os.O_RDONLY))

threads = {name: threading.Thread(target=call, args=(name,)) for name in "abc"}
for thread in threads.values():
    thread.start()
sys.stdin.readline()
signal.pthread_kill(threads["b"].ident, signal.SIGUSR1)
threads["b"].join()
print(answers["b"])
sys.stdin.readline()
for thread in threads.values():
    thread.join()
print(answers)
"""


def test_a_signal_interrupts_the_thread_it_is_for(mount):
    with program(THREADS, mount / "block") as caller:
        mount.wait_for(3)
        caller.stdin.write("\n")
        assert caller.stdout.readline() == "EINTR\n"
        mount.wait_for(2)
        mount.write("release")
        caller.stdin.write("\n")
        assert json.loads(caller.stdout.readline().replace("'", '"')) == {
            "a": "released", "b": "EINTR", "c": "released"}


def test_a_process_with_blocked_threads_is_killed(mount):
    with program(THREADS, mount / "block") as caller:
        mount.wait_for(3)
        caller.kill()
        assert caller.wait(SOON) == -signal.SIGKILL
        mount.wait_for(0)


POLLED = """
import select
poll = select.poll()
poll.register(os.open(sys.argv[1], os.O_RDONLY), select.POLLIN)
print("polling", flush=True)
poll.poll()
"""


def test_a_poller_is_not_blocked_in_the_file_system(mount):
    with program(POLLED, mount / "quiet") as caller:
        assert caller.stdout.readline() == "polling\n"
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(SOON) == -signal.SIGTERM


def test_an_inherited_descriptor_is_interrupted_by_its_reader(hooked):
    """The reader is not the opener of the file: the request tells (the watch could only look at the opener)."""
    descriptor = os.open(hooked / "block", os.O_RDONLY)
    try:
        cat = subprocess.Popen(["cat"], stdin=descriptor, stdout=subprocess.DEVNULL)
        hooked.wait_for(1)
        cat.kill()
        assert cat.wait(SOON) == -signal.SIGKILL
        hooked.wait_for(0)
    finally:
        os.close(descriptor)


# ---- requests ----

def test_the_caller_of_a_read_and_a_write_is_known(hooked):
    with open(hooked / "caller", "r+b", buffering=0) as file:
        me = [threading.get_native_id(), os.getuid(), os.getgid()]
        assert json.loads(file.read(100)) == me
        for size in (1, 4000, 4096, 100_000):   # libfuse leaves the larger ones in a pipe
            assert file.write(bytes(size)) == size
            assert json.loads((hooked / "writer").read_text()) == [*me, size]


def test_the_device_is_not_inherited_by_the_server_s_children(mount):
    """It was replaced and put back during FUSE_INIT."""
    server = Path(f"/proc/{mount.server.pid}")
    devices = [each.name for each in (server / "fd").iterdir() if os.readlink(each) == "/dev/fuse"]
    assert devices
    for device in devices:
        fields = dict(line.split(":\t") for line in (server / "fdinfo" / device).read_text().splitlines()[:2])
        assert int(fields["flags"], 8) & os.O_CLOEXEC


def test_requests_and_descriptors_do_not_pile_up(hooked):
    """A request goes when its task serves the next one, and tasks come and go with the load."""
    descriptors = f"/proc/{hooked.server.pid}/fd"
    hooked.wait_for(0)
    before = len(os.listdir(descriptors))
    for _ in range(20):
        with reader(hooked / "block") as cat:
            hooked.wait_for(1)
            cat.kill()
            cat.wait(SOON)
    with open(hooked / "plain", "rb", buffering=0) as file:
        for _ in range(500):
            assert os.pread(file.fileno(), 8, 0) == b"8 bytes\n"
    hooked.wait_for(0)
    assert len(os.listdir(descriptors)) == before
    assert hooked.status()["requests"] <= 10


# ---- passthrough ----

@contextmanager
def memory_of(mount):
    """The memfd itself, past the mount."""
    with open(mount.memory, "r+b", buffering=0) as file:
        yield file.fileno()


@pytest.fixture
def mem(passing):
    """A descriptor of `mem`, and at the end the proof that the server saw no read and no write of it."""
    before = passing.status()
    descriptor = os.open(passing / "mem", os.O_RDWR)
    yield descriptor
    os.close(descriptor)
    os.truncate(passing / "mem", SIZE)
    after = passing.status()
    assert (after["read"], after["write"]) == (before["read"], before["write"])


def test_reads_and_writes_pass_through(passing, mem):
    with memory_of(passing) as memory:
        assert os.pwrite(mem, b"through", 5000) == 7
        assert os.pread(memory, 7, 5000) == b"through"
        os.pwrite(memory, b"back", 5000)
        assert os.pread(mem, 7, 5000) == b"backugh"
        os.lseek(mem, 100, os.SEEK_SET)
        assert os.write(mem, b"ab") == 2
        assert os.lseek(mem, 0, os.SEEK_CUR) == 102
        os.lseek(mem, 100, os.SEEK_SET)
        assert os.read(mem, 2) == b"ab"
        assert os.pread(mem, 10, SIZE - 4) == bytes(4)
        assert os.pread(mem, 10, SIZE) == b""


def test_mappings_are_live_in_both_directions(passing, mem):
    with memory_of(passing) as memory, mmap.mmap(mem, SIZE) as mapped, mmap.mmap(memory, SIZE) as truth:
        mapped[70000:70003] = b"one"
        assert truth[70000:70003] == b"one"
        truth[70001:70002] = b"N"
        assert mapped[70000:70003] == b"oNe"
        assert os.pread(mem, 3, 70000) == b"oNe"
        mapped.flush()                                      # msync
        with mmap.mmap(mem, SIZE, flags=mmap.MAP_PRIVATE) as private:
            private[70000:70003] = b"own"
            assert truth[70000:70003] == b"oNe"


def test_a_mapping_is_live_in_a_forked_child(passing, mem):
    with memory_of(passing) as memory, mmap.mmap(mem, SIZE) as mapped:
        child = os.fork()
        if child == 0:
            mapped[8192:8197] = b"child"
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert mapped[8192:8197] == os.pread(memory, 5, 8192) == b"child"


def test_append_and_truncate(passing, mem):
    os.ftruncate(mem, SIZE - 4096)                          # to the server, which truncates the memfd
    assert os.fstat(mem).st_size == SIZE - 4096
    appended = os.open(passing / "mem", os.O_WRONLY | os.O_APPEND)
    try:
        assert os.write(appended, b"tail") == 4
    finally:
        os.close(appended)
    with memory_of(passing) as memory:
        assert os.fstat(memory).st_size == SIZE - 4092
        assert os.pread(memory, 4, SIZE - 4096) == b"tail"
    assert os.fstat(mem).st_size == SIZE - 4092
    os.ftruncate(mem, 2 * SIZE)
    with mmap.mmap(mem, 2 * SIZE) as mapped:
        mapped[-1:] = b"!"
    assert os.pread(mem, 2, 2 * SIZE - 1) == b"!"


def test_many_opens_in_any_order_of_close(passing, mem):
    descriptors = [os.open(passing / "mem", flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR) * 50]
    os.write(descriptors[-1], b"last")
    for descriptor in descriptors[::2] + descriptors[1::2]:
        os.close(descriptor)
    assert os.pread(mem, 4, 0) == b"last"
    with pytest.raises(OSError) as refused:
        os.write(os.open(passing / "mem", os.O_RDONLY), b"no")
    assert refused.value.errno == errno.EBADF


def test_an_open_file_outlives_its_name(passing, mem):
    os.pwrite(mem, b"still", 0)
    os.unlink(passing / "mem")                              # the kernel forgets it; this server does not
    assert os.pread(mem, 5, 0) == b"still"
    with mmap.mmap(mem, 4096) as mapped:
        assert mapped[:5] == b"still"


def test_past_the_end_of_sealed_memory(passing, tmp_path):
    """The memfd answers, or, if only mappings pass through, the server."""
    with mounted(tmp_path / "files") as mount, memory_of(mount) as memory:
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        through = os.open(mount / "mem", os.O_RDWR)
        direct = os.open(mount / "mem", os.O_RDWR | os.O_DIRECT)
        with pytest.raises(PermissionError):
            os.pwrite(through, b"xy", SIZE)
        assert os.pwrite(through, b"xyz", SIZE - 2) == 2
        served = mount.status()["write"]
        with pytest.raises(OSError) as failure:
            os.pwrite(direct, b"xy", SIZE)
        assert failure.value.errno == errno.EFBIG
        assert os.pwrite(direct, b"XYZ", SIZE - 2) == 2
        assert mount.status()["write"] == served + 2
        for descriptor in (through, direct):
            assert os.pread(descriptor, 10, SIZE - 2) == b"XY"
            with mmap.mmap(descriptor, SIZE) as mapped:
                mapped[:3] = b"map"
                assert os.pread(memory, 3, 0) == os.pread(through, 3, 0) == os.pread(direct, 3, 0) == b"map"
                os.pwrite(memory, b"mem", 0)
                assert mapped[:3] == b"mem"
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 2 * SIZE)
            assert os.fstat(descriptor).st_size == SIZE
            os.close(descriptor)


def test_wrong_calls_are_refused(passing):
    assert json.loads((passing / "refused").read_text()) == {
        "no descriptor": "EBADF", "a directory": "EISDIR", "a pipe": "EINVAL", "no id": "ENOENT",
        "twice": "ENOENT", "not in an open": "ValueError", "no request": "ValueError",
        "a negative id": "ValueError"}


MAPPED = """
descriptor = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(descriptor, 4096)
os.close(descriptor)
for line in sys.stdin:
    mapped[:4] = line.strip().encode()
    print(mapped[:4].decode(), flush=True)
"""


def test_a_mapping_outlives_a_killed_server(passing, tmp_path):
    with mounted(tmp_path / "files") as mount:
        with program(MAPPED, mount / "mem") as client:
            client.stdin.write("abcd\n")
            assert client.stdout.readline() == "abcd\n"
            mount.server.kill()
            mount.server.wait(SOON)
            client.stdin.write("efgh\n")
            assert client.stdout.readline() == "efgh\n"
            # A mapping keeps the mount busy, as on any file system: it goes lazily, or after the client.
            subprocess.run(["fusermount3", "-u", "-z", mount.path], check=True)
            assert not os.path.ismount(mount.path)
            client.stdin.write("ijkl\n")
            assert client.stdout.readline() == "ijkl\n"


def test_a_killed_server_is_unmounted_once_no_mapping_is_left(passing, tmp_path):
    with mounted(tmp_path / "files") as mount:
        with program(MAPPED, mount / "mem") as client:
            client.stdin.write("abcd\n")
            assert client.stdout.readline() == "abcd\n"
            mount.server.kill()
            mount.server.wait(SOON)
        subprocess.run(["fusermount3", "-u", mount.path], check=True)
        assert not os.path.ismount(mount.path)


def test_no_reader_outlives_a_killed_server(tmp_path):
    with mounted(tmp_path / "files") as mount, reader(mount / "block") as cat:
        mount.wait_for(1)
        mount.server.kill()
        mount.server.wait(SOON)
        assert cat.wait(SOON) == 1


OFF = {
    "VMFS_NO_PASSTHROUGH": ("switched off by VMFS_NO_PASSTHROUGH", True),
    "VMFS_NO_FUSE_HOOKS": ("switched off by VMFS_NO_FUSE_HOOKS", False),
    "TEST_DROP_SYS_ADMIN": ("the kernel lets only a process with CAP_SYS_ADMIN pass memory through", True),
}


@pytest.mark.parametrize("switch", OFF)
def test_without_passthrough_memory_is_served(passing, switch, tmp_path):
    reason, interrupts = OFF[switch]
    with mounted(tmp_path / "files", **{switch: "1"}) as mount:
        status = mount.status()
        assert (status["passthrough"], status["passthrough_reason"]) == (False, reason)
        assert status["interrupts"] == interrupts
        with open(mount / "mem", "r+b", buffering=0) as file, memory_of(mount) as memory:
            file.write(b"served")
            assert os.pread(memory, 6, 0) == b"served"
            with mmap.mmap(file.fileno(), SIZE) as mapped:
                assert mapped[:6] == b"served"
        status = mount.status()
        assert status["read"] > 0 and status["write"] > 0


if __name__ == "__main__":
    serve(sys.argv[1])
