"""DES, for the password of RFB's VNC authentication, by the OpenSSL library that Python itself stands on.

No package that vmfs needs has DES, which is good for nothing else, and `cryptography` is 10 MB for two blocks.

Source: RFC 6143, 7.2.2; errata 4951 there: the bits of each byte of the password are in reverse order.
"""

from __future__ import annotations

import _hashlib  # the module of Python's that is linked with OpenSSL, which is loaded then
import ctypes
import ctypes.util
import functools

from vmfs.words.errors import Unsupported

PASSWORD_MOST = 8  # bytes that count
_ENCRYPT = 1


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Found once, before a machine is in its sandbox, where it opens no file."""
    for name in (_hashlib.__file__, "libcrypto.so.3", "libcrypto.so.1.1"):
        try:
            library = ctypes.CDLL(name)
            library.DES_set_key_unchecked.restype = library.DES_ecb_encrypt.restype = None
            return library
        except (OSError, AttributeError):
            continue
    return None


def is_there() -> bool:
    return _library() is not None


def encrypt(password: str, challenge: bytes) -> bytes:
    """What a client that knows the password answers. Unsupported where this host's Python has no DES."""
    library = _library()
    if library is None:
        raise Unsupported("vnc: a password needs DES, which the OpenSSL of this Python has not: `nopassword`")
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode()[:PASSWORD_MOST].ljust(PASSWORD_MOST, b"\0"))
    schedule = ctypes.create_string_buffer(256)  # DES_key_schedule: 128 bytes
    library.DES_set_key_unchecked(key, schedule)
    answer = b""
    for at in range(0, len(challenge), 8):
        block = ctypes.create_string_buffer(8)
        library.DES_ecb_encrypt(challenge[at : at + 8], block, schedule, _ENCRYPT)
        answer += block.raw
    return answer
