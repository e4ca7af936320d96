"""How far written bytes have come, by the system's own count: what a slow peer has not read yet, it cannot answer."""

import fcntl
import socket
import struct
import sys
import termios
from typing import Final, NamedTuple

_TOLD: Final = sys.platform == "linux"
_INFO: Final = struct.Struct("=120xQ")
"""``struct tcp_info`` up to ``tcpi_bytes_acked``."""
_COUNT: Final = struct.Struct("i")


class Transit(NamedTuple):
    """Bytes of a connection. ``taken``: by the peer's machine, so far. ``held``: by this one, for it."""

    taken: int
    held: int


def transit(descriptor: int) -> Transit | None:
    """Of a TCP socket; None where the system does not say."""
    if not _TOLD or descriptor < 0:
        return None
    try:
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)
        try:
            (taken,) = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
        finally:
            sock.detach()
        (held,) = _COUNT.unpack(fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * _COUNT.size))
    except (OSError, struct.error):  # gone already, no TCP, or a system that tells less
        return None
    return Transit(taken, held)
