"""Templates on a host."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs import Machine
from vmfs.commands import archive
from vmfs.fleet.store import CHUNK, Hashing, Manifest, Store, read_chunk
from vmfs.fleet.unpacked import Unpacked
from vmfs.words.errors import Invalid


def written(tmp_path, data: bytes, kind: str = "saved"):
    path = tmp_path / "what"
    with open(path, "wb") as file:
        hashing = Hashing(file)
        for at in range(0, len(data), 1_000_000):
            hashing.write(data[at : at + 1_000_000])
    assert path.read_bytes() == data
    return path, hashing.manifest(kind)


def bring(entry, path):
    """All of its chunks, the last one first."""
    part = entry.part()
    for number in sorted(part.missing, reverse=True):
        part.put(number, read_chunk(path, number))
    entry.take(part)
    part.close()


def test_a_manifest_has_the_hash_of_each_chunk(tmp_path):
    data = os.urandom(2 * CHUNK + 5)
    _, manifest = written(tmp_path, data)
    assert manifest.size == len(data)
    assert [hashlib.sha256(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK)] == [*manifest.chunks]
    manifest.check()


def test_a_template_comes_whole_or_not_at_all(tmp_path):
    path, manifest = written(tmp_path, os.urandom(CHUNK + 1000))
    store = Store(tmp_path / "store")
    entry = store.use(manifest)
    part = entry.part()
    for wrong in (b"", bytes(CHUNK), read_chunk(path, 0)[:-1], read_chunk(path, 1)):
        with pytest.raises(Invalid, match="chunk 0"):
            part.put(0, wrong)
    part.put(1, read_chunk(path, 1))
    assert part.missing == {0} and not entry.is_whole
    part.close()
    assert sorted(os.listdir(entry.folder)) == ["users"]
    with entry.writing() as is_needed:
        assert is_needed
        bring(entry, path)
    assert entry.path.read_bytes() == path.read_bytes()
    with entry.writing() as is_needed:
        assert not is_needed
    assert store.find(manifest.id) == entry.path
    assert store.find("../" + manifest.id) is None


def test_one_writes_and_the_others_wait(tmp_path):
    path, manifest = written(tmp_path, os.urandom(1000))
    writes = []

    def take() -> None:
        store = Store(tmp_path / "store")
        entry = store.use(manifest)
        with entry.writing() as is_needed:
            if is_needed:
                writes.append(1)
                bring(entry, path)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writes == [1]


def test_workers_of_a_host_have_its_memory_once(tmp_path):
    """Each in a process of its own, as workers are; the memory outlives the one that has unpacked it."""
    with Machine(memory={0x1000: b"\xf4"}) as machine:
        machine.map(0x10_0000, b"there" * 100_000)
        path, manifest = written(tmp_path, machine.save(), "library")
    code = (
        "import msgspec, os, sys; from pathlib import Path; from vmfs.fleet.store import *;"
        "from vmfs.fleet.unpacked import Unpacked; store = Store(Path(sys.argv[1]));"
        "found = Unpacked.of(store.use(msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=Manifest)));"
        "print(*[os.fstat(fd).st_ino for fd in found.memory.values()], flush=True); sys.stdin.read()"
    )
    entry = Store(tmp_path / "store").use(manifest)
    with entry.writing():
        bring(entry, path)
    words = [sys.executable, "-c", code, tmp_path / "store", msgspec.msgpack.encode(manifest).hex()]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        inodes = first.stdout.readline()
        second = stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert len(inodes.split()) == 2 and second.stdout.readline() == inodes
        first.kill()
        first.wait()
        ours = Unpacked.of(entry)  # of the second one, since the first has ended
        assert [os.fstat(fd).st_ino for fd in ours.memory.values()] == [*map(int, inodes.split())]
        assert os.pread(ours.memory["1"], 10, 0) == b"therethere"
        with pytest.raises(OSError, match="Bad file descriptor"):  # it is open for reading
            os.pwrite(ours.memory["1"], b"x", 0)
        ours.close()
        second.kill()
        second.wait()
    ours = Unpacked.of(entry)
    assert [os.fstat(fd).st_ino for fd in ours.memory.values()] != [*map(int, inodes.split())]
    ours.close()


def test_what_unpacks_to_more_than_there_is_room_for_is_refused(tmp_path, monkeypatch):
    """A small file may come to anything."""
    with Machine(memory={0x1000: b"\xf4"}) as machine:
        machine.map(0x10_0000, b"there" * 1_000_000)
        library = machine.save()
    folder = tmp_path / "saved"
    for name in ("images", "disks"):
        (folder / name).mkdir(parents=True)
    for name in ("state", "info", "mem"):
        (folder / name).write_bytes(bytes(range(256)) * 10_000)
    packed = io.BytesIO()
    archive.write(folder, packed, "")
    for kind, data in (("library", library), ("saved", packed.getvalue())):
        assert len(data) < 100_000
        path, manifest = written(tmp_path, data, kind)
        entry = Store(tmp_path / "store").use(manifest)
        with entry.writing():
            bring(entry, path)
        with monkeypatch.context() as patched:
            patched.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
            with pytest.raises(Invalid, match="more than the 1048576 bytes that there is room for"):
                Unpacked.of(entry)
        Unpacked.of(entry).close()


def test_it_goes_with_its_last_user(tmp_path):
    path, manifest = written(tmp_path, b"content")
    stores = [Store(tmp_path / "store") for _ in range(2)]
    for store in stores:
        entry = store.use(manifest)
    bring(entry, path)
    stores[0].close()
    stores[0].sweep()
    assert entry.is_whole
    stores[1].close()
    stores[1].sweep(age=1000)
    assert entry.is_whole
    stores[1].sweep()
    assert not entry.folder.exists()
    again = stores[0].use(manifest)
    assert not again.is_whole and again.folder.exists()


def test_a_killed_user_holds_nothing(tmp_path):
    _, manifest = written(tmp_path, b"content")
    code = (
        "import sys, time; from pathlib import Path; from vmfs.fleet.store import *; import msgspec;"
        "s = Store(Path(sys.argv[1])); s.use(msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=Manifest));"
        "print('ready', flush=True); time.sleep(100)"
    )
    words = [sys.executable, "-c", code, tmp_path / "store", msgspec.msgpack.encode(manifest).hex()]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as user:
        assert user.stdout.readline() == b"ready\n"
        store = Store(tmp_path / "store")
        store.sweep()
        assert (store.root / manifest.id).exists()
        user.kill()
        user.wait()
    store.sweep()
    assert not (store.root / manifest.id).exists()


def test_the_folder_is_its_users_alone(tmp_path):
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("/tmp")
    for name in ("open", "link"):
        with pytest.raises(Invalid, match="this user's alone"):
            Store(tmp_path / name)


@given(st.binary(max_size=64), st.integers(0, 1 << 40), st.sampled_from(["saved", "x"]))
def test_a_manifest_that_does_not_fit_is_refused(data, size, kind):
    manifest = Manifest(kind, size, tuple(data[at : at + 32] for at in range(0, len(data), 32)))
    fits = kind == "saved" and len(manifest.chunks) == -(-size // CHUNK)
    try:
        manifest.check()
        assert fits
    except Invalid:
        assert not fits
