"""The end of what a port has sent."""

from vmfs.devices.sent import Sent


def test_the_last_bytes_are_kept():
    sent, everything = Sent(100), b""
    for number in range(1000):
        data = bytes([number % 251]) * (number % 7)
        sent.append(data)
        everything += data
        kept = sent.read(0, 1000)
        assert len(kept) == len(sent) <= 200
        assert everything.endswith(kept) and len(kept) >= min(len(everything), 100)
    assert sent.read(len(sent) - 3, 10) == everything[-3:] and sent.read(len(sent), 10) == b""


def test_more_at_once_than_is_kept():
    sent = Sent(100)
    sent.append(b"a")
    sent.append(bytes(1000) + b"b" * 99)
    assert sent.read(0, 1000) == b"\0" + b"b" * 99
