"""IDE drives through the mount: the lines of dev/add, and media that are changed."""

from __future__ import annotations

import errno
import os

import pytest
from mounting import failing


@pytest.fixture
def images(tmp_path):
    for name in ("one.iso", "two words.iso"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "disk").write_bytes(bytes(4096))
    return tmp_path


def test_drives_have_the_names_of_their_places(vm, images):
    vm.write("machine", "pc")
    vm.write("dev/add", f"ide {images}/disk cow\ncdrom {images}/one.iso\nide {images}/disk ro as=hdd\ncdrom as=hdb")
    assert {"ide", "hda", "hdb", "hdc", "hdd"} <= set(os.listdir(vm / "dev"))
    assert vm.read("dev/hdb/media") == "none\n" and not (vm / "dev/hda/media").exists()
    assert vm.read("dev/ide/info").splitlines()[-1] == "drives hda hdb hdc hdd"
    for line, error in (
        (f"ide {images}/disk", errno.EBUSY),  # it is open, by flock
        (f"ide {images}/disk ro", errno.ENOSPC),
        (f"ide {images}/disk ro as=hde", errno.EINVAL),
        (f"ide {images}/disk ro as=hda", errno.EINVAL),
        (f"ide {images}/disk never", errno.EINVAL),
        ("ide as=hda", errno.EINVAL),
        (f"cdrom {images}/none", errno.ENOENT),
        (f"cdrom {images}/one.iso rw", errno.EINVAL),
        (f"cdrom {images}", errno.EINVAL),
    ):
        assert failing(vm.write, "dev/add", line) == error, line
        assert vm.read("error")
    assert failing((vm / "dev/ide").rmdir) == errno.EBUSY
    for name in ("hda", "hdb", "hdc", "hdd"):
        (vm / "dev" / name).rmdir()
    assert "ide" not in os.listdir(vm / "dev")


def test_a_disc_is_changed(vm, images):
    vm.write("machine", "pc")
    vm.write("dev/add", f"cdrom {images}/one.iso")
    media = "dev/hdc/media"
    assert vm.read(media) == f"{images}/one.iso\n" and (vm / media).stat().st_size == len(vm.read(media))
    vm.write("reg/rip", "0x7c00")
    vm.write("reg/cs.base", "0")
    with open(vm / "mem", "r+b", buffering=0) as memory:
        memory.seek(0x7C00)
        memory.write(b"\xf4" * 16)
    vm.read("vm_run")
    vm.write(media, f"'{images}/two words.iso'")
    assert vm.read(media) == f"{images}/two words.iso\n"
    assert "blocks 7" in vm.read("dev/hdc/info")
    vm.write(media, "eject")
    assert vm.read(media) == "none\n"
    for text, error in (
        ("eject", errno.EINVAL),
        ("eject now", errno.EINVAL),
        (f"{images}/none", errno.ENOENT),
        (f"{images}/one.iso rw", errno.EINVAL),
        (f"{images}/one.iso ro more", errno.EINVAL),
        ("'", errno.EINVAL),
        (str(images), errno.EINVAL),
        (f"{vm.path}/mem", errno.EINVAL),
    ):
        assert failing(vm.write, media, text) == error, text
        assert vm.read(media) == "none\n" and vm.read("error")
    vm.write(media, f"{images}/one.iso ro")
    assert vm.read(media) == f"{images}/one.iso\n"


def test_floppies(vm, images):
    (images / "floppy").write_bytes(bytes(1440 << 10))
    (images / "old").write_bytes(bytes(360 << 10))
    vm.write("machine", "pc")
    for line, error in (
        (f"floppy {images}/disk ro", errno.EINVAL),
        (f"floppy {images}/none", errno.ENOENT),
        (f"floppy {images}/floppy never", errno.EINVAL),
    ):
        assert failing(vm.write, "dev/add", line) == error, line
    assert "fdc" not in os.listdir(vm / "dev")
    vm.write("dev/add", f"floppy {images}/floppy\nfloppy")
    assert {"fdc", "fd0", "fd1"} <= set(os.listdir(vm / "dev"))
    assert failing(vm.write, "dev/add", "floppy") == errno.ENOSPC
    assert failing(vm.write, "dev/fd1/media", f"{images}/floppy") == errno.EBUSY  # it is in the other drive
    vm.write("dev/fd1/media", f"{images}/old ro")
    assert "format 40 cylinders, 2 heads, 9 sectors" in vm.read("dev/fd1/info")
    assert failing(vm.write, "dev/fd1/media", f"{images}/disk ro") == errno.EINVAL
    assert "are no floppy" in vm.read("error") and vm.read("dev/fd1/media") == f"{images}/old\n"
    for name in ("fd0", "fd1"):
        (vm / "dev" / name).rmdir()
    assert "fdc" not in os.listdir(vm / "dev")
