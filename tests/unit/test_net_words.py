"""The words of a `net` line."""

from __future__ import annotations

import argparse
import random
import re

import pytest

from vmfs.commands import boot
from vmfs.words.errors import Invalid
from vmfs.words.nets import parse, passt_options

MODELS = "virtio", "e1000"


def test_what_a_line_asks_for() -> None:
    asked = parse(["user", "tcp=2222:22", "mac=52:54:00:12:34:56", "--no-dhcp", "pcap=/a b", "model=e1000"], MODELS)
    assert asked.rest == ("tcp=2222:22", "--no-dhcp") and asked.model == "e1000" and asked.pcap == "/a b"
    assert asked.mac == bytes.fromhex("525400123456")
    assert parse(["tap", "tap0"], MODELS).model == "virtio"


@pytest.mark.parametrize("line", [
    "tap", "tap a b", "wire", "wire .a", "wire a/b", "router", "user model=x", "user model=", "user mac=1",
    "user mac=01:00:00:00:00:00", "user tcp=", "user tcp=22", "user tcp=0:22", "user tcp=1:65536", "user tcp=a/1:2",
    "user udp=1:2:3", "user tcp=/1:2", "user tcp=1:-2",
])  # fmt: skip
def test_what_is_none(line: str) -> None:
    with pytest.raises(Invalid):
        parse(line.split(), MODELS)


def test_forwards_are_of_the_loopback_where_nothing_is_said() -> None:
    words = ["tcp=2222:22", "-t", "80", "udp=0.0.0.0/53:53", "tcp=::1/8080:80"]
    assert passt_options(words) == [
        "-t", "127.0.0.1/2222:22", "-t", "80", "-u", "0.0.0.0/53:53", "-t", "::1/8080:80"
    ]  # fmt: skip


FORWARD = re.compile(r"[0-9a-fA-F.:]+/[1-9][0-9]{0,4}:[1-9][0-9]{0,4}", re.ASCII)
WORDS = ("user", "tap", "wire", "model=", "mac=", "pcap=", "tcp=", "udp=", "virtio", "52:54:00:12:34:56", "1:2",
         "[::1]/1:2", "0.0.0.0/", "a" * 70, "..", "/", "=", "\0", "٣:٤", "-t", "--")  # fmt: skip


def test_any_words_are_a_line_or_invalid() -> None:
    dice, lines = random.Random(3), 0
    for _ in range(20_000):
        words = ["".join(dice.choices(WORDS, k=dice.choice((1, 1, 2, 3)))) for _ in range(dice.randrange(1, 6))]
        words[0] = dice.choice(WORDS[:4])
        try:
            asked = parse(words, MODELS)
        except Invalid as error:
            assert len(str(error)) < 300
            continue
        lines += 1
        assert asked.model in MODELS and len(asked.mac) in (0, 6)
        if asked.kind == "user":
            for word in asked.rest:
                if word.startswith(("tcp=", "udp=")):
                    option, value = passt_options([word])
                    assert option in ("-t", "-u") and FORWARD.fullmatch(value)
        elif asked.kind == "wire":
            assert "/" not in asked.rest[0] and not asked.rest[0].startswith(".")
    assert 100 < lines < 19_000


def planned(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    boot.add_arguments(parser)
    return [line for line, _ in boot.plan_of(parser.parse_args(words)).lines]


def test_nets_of_boot() -> None:
    assert planned("--bios", "x", "--forward", "2222:22") == ["net user tcp=2222:22"]
    words = ["--bios", "x", "--net", "wire lan", "--net", "user model=e1000", "--forward", "1:2", "--forward", "3:4"]
    nets = planned(*words)
    assert nets == ["net wire lan", "net user model=e1000 tcp=1:2 tcp=3:4"]
    assert planned("--bios", "x", "--net", "user 'pcap=/a b'") == ["net user 'pcap=/a b'"]
    for line in "", "'":
        with pytest.raises(Invalid):
            planned("--bios", "x", "--net", line)
