"""A seed for cloud images: a CD by which cloud-init makes a user, as its NoCloud reads it.

Source: cloud-init's reference, datasource NoCloud (a file system labelled cidata with user-data and meta-data) and the
modules "Users and Groups" and "SSH". The files are JSON, which is YAML.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import json
import re
from collections.abc import Sequence
from typing import IO

from vmfs.words.errors import Invalid, Unsupported

LABEL = "cidata"
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_KEY = re.compile(r"(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+={0,2}(?: [^\n]*)?", re.ASCII)
_KEYS_MOST = 64 << 10  # bytes of a file


def check_user(name: str) -> str:
    if not _USER.fullmatch(name):
        raise Invalid(f"{name[:40]!r} is no name for a user: a to z, digits, _ and -, up to 32, no digit first")
    return name


def keys_of(path: str, text: bytes) -> list[str]:
    """The public keys in a file, a line each."""
    if len(text) > _KEYS_MOST:
        raise Invalid(f"{path}: {len(text)} bytes are more than keys have")
    if b"PRIVATE KEY" in text:
        raise Invalid(f"{path}: a private key, which no machine may have: name the public one, as {path}.pub")
    lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    for key in keys:
        if not _KEY.fullmatch(key) or not _is_base64(key.split()[1]):
            raise Invalid(f"{path}: {key[:40]!r} is no public key of ssh")
    if not keys:
        raise Invalid(f"{path}: there is no key in it")
    return keys


def _is_base64(text: str) -> bool:
    try:
        return bool(binascii.a2b_base64(text, strict_mode=True))
    except binascii.Error:
        return False


def files(user: str | None, keys: Sequence[str]) -> dict[str, bytes]:
    """user-data and meta-data. Without `user` the keys are for the one that the image has."""
    if user is None:
        wanted: dict[str, object] = {"ssh_authorized_keys": list(keys)}
    else:
        account = {"name": user, "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL", "lock_passwd": True}
        wanted = {"users": [{**account, "ssh_authorized_keys": list(keys)}]}
    user_data = b"#cloud-config\n" + json.dumps(wanted, indent=1).encode() + b"\n"
    # Another seed is another instance: cloud-init does then what it does for the first one.
    instance = hashlib.sha256(user_data).hexdigest()[:16]
    meta = json.dumps({"instance-id": f"vmfs-{instance}", "local-hostname": "vmfs"}).encode() + b"\n"
    return {"user-data": user_data, "meta-data": meta}


def write(file: IO[bytes], contents: dict[str, bytes]) -> None:
    """As an ISO 9660 file system with these files."""
    try:
        import pycdlib
    except ImportError:
        raise Unsupported("a seed takes the Python package pycdlib, which is not installed") from None
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    for number, (name, data) in enumerate(contents.items()):
        iso.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    iso.write_fp(file)
    iso.close()
