"""Debian's xhci_hcd, usb-storage and usbhid: a disk that is written, a keyboard and a tablet."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from pc.kernels import GENERIC, needs_kernels
from pc.test_virtio_linux import MIB, _e2, booted, counters, ext4, info  # noqa: F401
from vnc.rfb import Viewer

pytestmark = needs_kernels

# Prints so many events of the input device whose name ends with that, when they have come.
EVENTS = """\
event=$(grep -A 5 "Name=.*vmfs $1\\"" /proc/bus/input/devices | sed -n 's/.*Handlers=.*\\(event[0-9]*\\).*/\\1/p')
exec 3</dev/input/$event
echo it listens
dd bs=24 count=$2 <&3 2>/dev/null | od -A n -v -t x1
"""
KEY, REL, ABS = 1, 2, 3  # Linux include/uapi/linux/input-event-codes.h
KEY_A, KEY_LEFTSHIFT, KEY_CAPSLOCK, BTN_LEFT, REL_WHEEL = 30, 42, 58, 0x110, 8


def events(pc, name: str, count: int, do: Callable[[], object]) -> list[tuple[int, int, int]]:
    """What evdev has of what somebody does: type, code and value, but for EV_SYN and EV_MSC."""
    pc.type(f"events {name} {count}; echo came=$?\n")
    pc.expect(r"it listens\r\n")
    begin = pc.seen
    do()
    match = pc.expect(r"came=0\r\n")
    data = bytes.fromhex("".join(pc.said[begin : match.start()].split()))
    pc.expect("guest# ")
    found = [struct.unpack("<16xHHi", data[at : at + 24]) for at in range(0, len(data), 24)]
    return [one for one in found if one[0] in (KEY, REL, ABS)]


def test_a_disk_a_keyboard_and_a_tablet(make_pc, ext4: Path, tmp_path: Path) -> None:  # noqa: F811
    pc = make_pc()
    for line in (f"usb-disk {ext4} rw", "usb-kbd", "usb-tablet"):
        pc.write("dev/add", f"{line}\n")
    booted(
        pc,
        {
            "fill": "until [ -b /dev/sda ] && grep -q vmfs.tablet /proc/bus/input/devices; do sleep 0.1; done\n"
            "mount /dev/sda /mnt\nhead -c 2097152 /dev/urandom >/mnt/copy\nsync\n"
            "echo 3 >/proc/sys/vm/drop_caches\nmd5sum </mnt/copy",
            "events": EVENTS,
            "again": "dd if=/mnt/copy bs=1M iflag=direct 2>/dev/null | md5sum\numount /mnt",
        },
        modules=("xhci_pci", "usb_storage", "sd_mod", "crc32c_generic", "ext4", "usbhid", "hid_generic", "evdev"),
        kernel=GENERIC,
    )
    wanted = pc.shell("fill").split()[0]
    assert pc.shell("again").split()[0] == wanted
    counted = counters(pc, "usb-disk0")
    assert counted["write_bytes"] >= 2 * MIB and counted["read_bytes"] >= 4 * MIB and counted["flushes"] > 0
    assert _e2("e2fsck", "-fn", ext4) == 0

    found = events(pc, "keyboard", 10, lambda: pc.write("keyboard", "A"))  # MSC and SYN beside each
    assert found == [(KEY, KEY_LEFTSHIFT, 1), (KEY, KEY_A, 1), (KEY, KEY_A, 0), (KEY, KEY_LEFTSHIFT, 0)][: len(found)]
    assert len(found) >= 3, found
    found = events(pc, "tablet", 6, lambda: pc.write("mouse", "@0,399 +left"))
    places = {one for one in found if one[0] == ABS}
    assert (KEY, BTN_LEFT, 1) in found and {code for _, code, _ in places} >= {1}, found
    assert max(value for _, code, value in places if code == 1) > 32000, found
    pc.write("vnc", f"{tmp_path}/vnc\n")
    with Viewer(tmp_path / "vnc") as viewer:
        width, height = viewer.begin()
        found = events(pc, "tablet", 5, lambda: viewer.point(0, width - 1, height // 2))
    x, y = (0x8000 * (2 * at + 1) // (2 * size) for at, size in ((width - 1, width), (height // 2, height)))
    assert {(ABS, 0, x), (ABS, 1, y), (KEY, BTN_LEFT, 0)} <= set(found), found
    said = pc.shell("dmesg | grep -e usb -e xhci -e sda")
    assert "Host supports USB 3.0 SuperSpeed" in said and "new SuperSpeed USB device" in said, said
    assert not any(word in said for word in ("error", "reset", "failed", "timed out", "WARN")), said
    assert pc.shell("grep -c 'PCI-MSI.*xhci' /proc/interrupts").strip() >= "1"
    assert info(pc, "xhci")["ports"] == "1:usb-kbd0 3:usb-tablet0 5:usb-disk0"
    assert info(pc, "usb-kbd0")["configured"] == "yes" and "bad_dma" not in counters(pc, "xhci")
