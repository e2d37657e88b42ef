"""Templates on a host."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs.fleet.store import CHUNK, Manifest, Store, manifest_of, read_chunk
from vmfs.words.errors import Invalid


def written(tmp_path, data: bytes, kind: str = "saved"):
    path = tmp_path / "what"
    path.write_bytes(data)
    return path, manifest_of(path, kind)


def test_a_template_comes_whole_or_not_at_all(tmp_path):
    path, manifest = written(tmp_path, os.urandom(CHUNK + 1000))
    store = Store(tmp_path / "store")
    entry = store.use(manifest)
    for wrong in (lambda n: b"", lambda n: bytes(manifest.size_of(n)), lambda n: read_chunk(path, n)[:-1]):
        with entry.writing() as is_needed, pytest.raises(Invalid, match="chunk 0"):
            assert is_needed
            entry.write(wrong)
        assert not entry.is_whole and sorted(os.listdir(entry.folder)) == ["users", "writer"]
    with entry.writing() as is_needed:
        assert is_needed
        entry.write(lambda number: read_chunk(path, number))
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
                entry.write(lambda number: read_chunk(path, number))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writes == [1]


def test_it_goes_with_its_last_user(tmp_path):
    path, manifest = written(tmp_path, b"content")
    stores = [Store(tmp_path / "store") for _ in range(2)]
    for store in stores:
        entry = store.use(manifest)
    with entry.writing():
        entry.write(lambda number: read_chunk(path, number))
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
    import msgspec

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
