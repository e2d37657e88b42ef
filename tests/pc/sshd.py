"""A guest with an ssh server: Debian's dropbear in an initramfs of its generic kernel."""

from __future__ import annotations

from pathlib import Path

from pc.initramfs import build
from pc.kernels import DEBIAN, GENERIC

_LIBRARIES = ("libtomcrypt.so.1", "libtommath.so.1", "libz.so.1", "libcrypt.so.1", "libc.so.6", "libgmp.so.10")
_LEASE = """#!/bin/sh
[ "$1" != bound ] || { ip addr add $ip/$mask dev $interface; ip route add default via $router; }
"""
# The key is in the folder that is shared.
_SCRIPT = """busybox --install -s /bin
mkdir -p /dev/pts /etc/dropbear /var/run /share /root/.ssh
mount -t devpts devpts /dev/pts
mount -t 9p -o trans=virtio,version=9p2000.L share0 /share
cp /share/authorized_keys /root/.ssh
chmod -R go= /root
ip link set eth0 up
udhcpc -q -n -t 20 -T 1 -i eth0 -s /lease
/usr/sbin/dropbear -R && echo guest: sshd
exec setsid cttyhack sh
"""


def _library(name: str) -> bytes:
    folders = (DEBIAN / "lib/x86_64-linux-gnu", DEBIAN / "usr/lib/x86_64-linux-gnu")
    found = next(folder / name for folder in folders if (folder / name).exists())
    return found.read_bytes()


def initrd() -> bytes:
    """When it prints `guest: sshd`, root may log in with the key that `share0` has in `authorized_keys`."""
    files = {f"lib/x86_64-linux-gnu/{name}": _library(name) for name in _LIBRARIES}
    files["lib64/ld-linux-x86-64.so.2"] = Path(DEBIAN, "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").read_bytes()
    files["usr/sbin/dropbear"] = Path(DEBIAN, "usr/sbin/dropbear").read_bytes()
    files |= {"etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n", "etc/shells": b"/bin/sh\n", "lease": _LEASE.encode()}
    return build(_SCRIPT, kernel=GENERIC, modules=("virtio_pci", "virtio_net", "9pnet_virtio", "9p"), files=files)
