"""What a terminal on a console shows, and in which order."""

import os
import socket

from vmfs.commands import terminal


def test_what_the_guest_said_comes_before_the_news_of_it(monkeypatch):
    """A stop is told after all that the guest wrote until then, though both are there at once."""
    ours, its = socket.socketpair()
    news, tell = os.pipe()
    screen, shown = os.pipe()
    monkeypatch.setattr("sys.stdin", None)
    texts = [b"it stands\n", b"it stands again\n", b""]

    def hear() -> bool:
        os.read(news, 1)
        text = texts.pop(0)
        os.write(shown, text)
        if text and len(texts) == 2:
            its.sendall(b"second\n")
        return not text

    its.sendall(b"x" * 10000 + b"\nfirst\n")
    os.write(tell, b"\n\n\n")
    try:
        assert terminal.attach(ours.fileno(), news=news, hear=hear, outputs=(shown,)) is False
        assert os.read(screen, 1 << 16).lstrip(b"x") == b"\nfirst\nit stands\nsecond\nit stands again\n"
    finally:
        for fd in (news, tell, screen, shown):
            os.close(fd)
        ours.close()
        its.close()
