"""The seed of a cloud image: what is in it, and what is refused."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmfs import cli
from vmfs.commands import boot, seed
from vmfs.words.errors import Invalid

pycdlib = pytest.importorskip("pycdlib", reason="the package pycdlib is not installed")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGq3L8cJQ2b1v0eTzJ1m1rGq1g5Wb0p3nqYy0mYwzvKj me@here: \"a\" {b}"
OTHER = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTY="


def cloud_config(files: dict[str, bytes]) -> dict:
    head, _, body = files["user-data"].partition(b"\n")
    assert head == b"#cloud-config"
    return json.loads(body)


def test_a_user_and_keys():
    files = seed.files("me", [KEY, OTHER])
    (user,) = cloud_config(files)["users"]
    assert user["name"] == "me" and user["ssh_authorized_keys"] == [KEY, OTHER] and user["lock_passwd"]
    meta = json.loads(files["meta-data"])
    assert meta["local-hostname"] == "vmfs"
    assert meta["instance-id"] != json.loads(seed.files("you", [KEY])["meta-data"])["instance-id"]
    assert cloud_config(seed.files(None, [KEY])) == {"ssh_authorized_keys": [KEY]}


def test_the_cd_has_them():
    files, out = seed.files("me", [KEY]), io.BytesIO()
    seed.write(out, files)
    data = out.getvalue()
    assert data[0x8000:0x8006] == b"\1CD001" and data[0x8028:0x8048].rstrip() == b"cidata"
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(data))
    for name, content in files.items():
        for way in ({"rr_path": f"/{name}"}, {"joliet_path": f"/{name}"}):
            got = io.BytesIO()
            iso.get_file_from_iso_fp(got, **way)
            assert got.getvalue() == content
    iso.close()


@pytest.mark.parametrize("name", ["", "9a", "a b", "root:x", "-a", "a" * 33, "A", "é", "a\n"])
def test_a_name_that_is_none(name):
    with pytest.raises(Invalid, match="no name for a user"):
        seed.check_user(name)


def test_keys_are_lines():
    text = f"# mine\n{KEY}\n\n{OTHER}\n".encode()
    assert seed.keys_of("k.pub", text) == [KEY, OTHER]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no key in it"),
        (b"# only this\n", "no key in it"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n", "private key.*k.pub"),
        (b"command=\"x\" ssh-rsa AAAA\n", "no public key"),
        (b"ssh-rsa A\n", "no public key"),
        (b"ssh-rsa\n", "no public key"),
        (b"\xff\xfe\0", "no public key"),
        (b"a" * 100_000, "more than keys have"),
    ],
)
def test_what_is_no_key(text, words):
    with pytest.raises(Invalid, match=words):
        seed.keys_of("k", text)


@given(st.binary(max_size=300))
def test_any_file_is_keys_or_a_sentence(data):
    try:
        keys = seed.keys_of("k", data)
    except Invalid as error:
        assert str(error).startswith("k: ")
    else:
        assert all("\n" not in key for key in keys)


def test_boot_has_it(tmp_path, monkeypatch):
    image, key = tmp_path / "image", tmp_path / "key.pub"
    image.write_bytes(bytes(510) + b"\x55\xaa")
    key.write_text(f"{KEY}\n")
    monkeypatch.setattr(boot, "seabios", lambda: "/bios")

    def plan(*words: str) -> boot.Plan:
        return boot.plan_of(cli.make_parser(["boot"]).parse_args(["boot", str(image), *words]))

    assert not plan().seed
    assert plan("--user", "me", "--ssh-key", str(key)).seed == seed.files("me", [KEY])
    assert plan("--ssh-key", str(key)).seed == seed.files(None, [KEY])
    with pytest.raises(Invalid, match="takes a key"):
        plan("--user", "me")
    with pytest.raises(Invalid, match="No such file"):
        plan("--ssh-key", str(tmp_path / "none"))
