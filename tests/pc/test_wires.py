"""Two Linux machines on a wire, and what passes in a pcap file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pc.conftest import Pc, boot_linux
from pc.kernels import needs_kernels

scapy = pytest.importorskip("scapy.all", reason="scapy is not installed (make setup)")
pytestmark = needs_kernels


def booted(pc: Pc, address: str) -> Pc:
    scripts = {
        "bin/serve": b"#!/bin/sh\nhead -c 2000000 /dev/urandom >/tmp/data\nmd5sum </tmp/data\nhttpd -p 80 -h /tmp\n",
        "bin/fetch": b"#!/bin/sh\nwget -q -O - http://10.9.0.1/data | md5sum\n",
    }
    boot_linux(pc, modules=("virtio_pci", "virtio_net"), files=scripts)
    pc.expect("guest# ")
    pc.shell(f"ifconfig eth0 {address} up")
    return pc


def test_two_machines_ping_each_other_and_are_captured(make_pc, tmp_path: Path) -> None:
    one, two = make_pc(), make_pc()
    one.write("dev/add", f"net wire lan pcap='{tmp_path}/a capture' mac=52:54:00:00:00:01\n")
    two.write("dev/add", "net wire lan mac=52:54:00:00:00:02\n")
    booted(one, "10.9.0.1")
    booted(two, "10.9.0.2")
    before = two.read("dev/net0/pcap")
    assert before == "none\n" and one.read("dev/net0/pcap") == f"{tmp_path}/a capture\n"
    two.write("dev/net0/pcap", f"{tmp_path}/other\n")
    assert " 0% packet loss" in one.shell("ping -c 3 -i 0.2 10.9.0.2")
    two.write("dev/net0/pcap", "off\n")
    assert one.shell("serve") == two.shell("fetch")
    for path in tmp_path / "a capture", tmp_path / "other":
        packets = scapy.rdpcap(str(path))
        pings = [(packet[scapy.IP].src, packet[scapy.ICMP].type) for packet in packets if scapy.ICMP in packet]
        assert pings == [("10.9.0.1", 8), ("10.9.0.2", 0)] * 3
        times = [packet.time for packet in packets]
        assert times == sorted(times)
    captured = scapy.rdpcap(str(tmp_path / "a capture"))
    seen = sum(len(packet[scapy.TCP].payload) for packet in captured if scapy.TCP in packet)
    assert seen >= 2_000_000 and not any(scapy.TCP in packet for packet in scapy.rdpcap(str(tmp_path / "other")))
