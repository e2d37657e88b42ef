"""Programs of Debian inside a guest say what they say on the host: digests, checksums, encodings, sorting, factors, and
OpenSSL's ciphers both ways. The guest's CPU has what the host's has of x86-64-v3, so they take the same functions.
Python's own tests of numbers, of strings and of what it has from zlib and OpenSSL pass there (`make repeat`)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from pc.conftest import boot_linux
from pc.kernels import DEBIAN, FOLDER, needs_debian, needs_kernels
from pc.test_virtio_linux import MIB, _e2

pytestmark = [needs_kernels, needs_debian]

OPENSSL = FOLDER.parent / "bench/programs"  # scripts/fetch_bench.sh
HANDOVER = """\
mount -t ext4 -o ro /dev/vda /mnt
mount -t devtmpfs dev /mnt/dev
mount -t tmpfs tmp /mnt/tmp
chroot /mnt /bin/bash /checks
poweroff -f
"""
COREUTILS = (
    *(f"{name} data" for name in "md5sum sha1sum sha224sum sha256sum sha384sum sha512sum b2sum cksum sum wc".split()),
    *(f"{name} <data | md5sum" for name in ("base64", "base32", "od -x", "tac", "sort", "tr a-y b-z")),
    "factor 18446744073709551557 1000000016000000063",
    "for n in 3 5 7; do echo $((n ** 39 % 1000003)) $((-n * 123456789012345 / 7)); done",
)
KEY, IV = bytes(range(32)).hex(), bytes(range(16)).hex()
CIPHERS = {"aes-128-cbc": 32, "aes-256-ctr": 64, "aes-192-cfb": 48, "chacha20": 64, "camellia-128-ofb": 32}
DIGESTS = "md5 sha1 sha256 sha512 sha3-256 blake2b512 sm3".split()
CRYPTO = (
    *(f"openssl dgst -r -{name} data" for name in DIGESTS),
    *(
        f"openssl enc -{name} -K {KEY[:key]} -iv {IV} -in data | tee /tmp/sealed | md5sum; "
        f"openssl enc -d -{name} -K {KEY[:key]} -iv {IV} -in /tmp/sealed | md5sum"
        for name, key in CIPHERS.items()
    ),
    "openssl prime -checks 8 170141183460469231731687303715884105727",
    "openssl pkeyutl -sign -inkey rsa.pem -in twenty -pkeyopt digest:sha1 | md5sum",
    "openssl dgst -sha256 -sign rsa.pem data | md5sum",
)
PYTHON = (
    "math cmath float complex int long struct hashlib zlib binascii array bytes memoryview random json sort".split()
)


def image_of(tree: Path, script: str, image: Path) -> None:
    for name in ("dev", "tmp"):
        (tree / name).mkdir(exist_ok=True)
    (tree / "checks").write_text(script)
    with open(image, "wb") as file:
        file.truncate(320 * MIB)
    assert _e2("mkfs.ext4", "-q", "-F", "-d", tree, image) == 0


def test_programs_say_what_they_say_on_the_host(make_pc, tmp_path: Path) -> None:
    tree, image = tmp_path / "root", tmp_path / "image"
    shutil.copytree(DEBIAN, tree, symlinks=True)
    lines = ["export LC_ALL=C", *COREUTILS]
    (tree / "data").write_bytes(random.Random(1).randbytes(1_000_003))
    if OPENSSL.exists() and shutil.which("openssl"):
        shutil.copytree(OPENSSL, tree, symlinks=True, dirs_exist_ok=True)
        subprocess.run(["openssl", "genrsa", "-out", tree / "rsa.pem", "2048"], check=True, capture_output=True)
        (tree / "twenty").write_bytes(bytes(20))
        lines += CRYPTO
    image_of(tree, "\n".join(["cd /", "export PATH=/bin:/sbin:/usr/bin", *lines, "echo all said", ""]), image)
    host = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tree, capture_output=True, text=True, check=True).stdout

    pc = make_pc()
    pc.write("dev/add", f"blk {image} rw\n")
    boot_linux(pc, HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))
    pc.expect(r"all said\r\n")
    said = pc.said.replace("\r", "")
    found = [line for line in said[: said.rindex("all said")].splitlines() if line]
    assert found[-len(host.splitlines()) :] == host.splitlines()
    assert pc.ended().startswith("shutdown cause=poweroff")


@pytest.mark.timeout(1800)
@pytest.mark.skipif("VMFS_REPEAT_STEP" not in os.environ, reason="takes a minute: make repeat")
def test_pythons_own_tests(make_pc, tmp_path: Path) -> None:
    if not (OPENSSL / "usr/lib/python3.11/test/test_math.py").exists():
        pytest.skip(f"{OPENSSL} has no tests of Python: scripts/fetch_bench.sh")
    tree, image = tmp_path / "root", tmp_path / "image"
    for each in (DEBIAN, OPENSSL):
        shutil.copytree(each, tree, symlinks=True, dirs_exist_ok=True)
    names = [f"test_{name}" for name in PYTHON]
    run = f"cd /tmp; export PATH=/bin:/usr/bin HOME=/tmp; python3.11 -m test {' '.join(names)}; echo all said\n"
    image_of(tree, run, image)
    pc = make_pc()
    pc.write("dev/add", f"blk {image} rw\n")
    boot_linux(pc, HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))
    for name in names:
        pc.expect(name)
    pc.expect(r"all said\r\n")
    assert f"All {len(names)} tests OK." in pc.said and "Tests result: SUCCESS" in pc.said, pc.said[-3000:]
    assert pc.ended().startswith("shutdown cause=poweroff")
