"""Fan-out of the same bytes to many connections: compiled where it was built, a loop of writes where not.

A ``Sink`` is the part of a handle that the compiled loop reads without touching Python:

``transport``  owns the connection.
``fd``         its socket's descriptor if bytes may be handed to it directly, otherwise -1 (TLS, for one).
``closing``    nothing may be written any more; set at the latest in ``connection_lost``, before the descriptor is closed.
``dirty``      the transport may hold bytes that have to go first. Whoever writes to the transport sets it; ``fan_out`` clears it
               once the transport's buffer is empty.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any


class PlainSink:
    """The same fields without the compiled module."""

    __slots__ = ("closing", "dirty", "fd", "transport")

    def __init__(self, transport: Any, fd: int) -> None:
        self.transport = transport
        self.fd = fd
        self.closing = False
        self.dirty = True


def plain_fan_out(handles: list[Any], frames: bytes) -> None:
    """Write ``frames`` through every handle's ``write``; the oracle of the compiled loop."""
    for handle in handles:
        handle.write(frames)


fan_out: Callable[[list[Any], bytes], None]
"""Write the same frames to every handle; each connection's bytes keep the order of the writes.

What a socket does not take at once is left to its transport. Handles that are not a ``Sink`` are written to through ``write``.
"""

if TYPE_CHECKING:
    from kimera_stream.kernels._egress import Sink as Sink

    COMPILED: bool
else:
    try:
        from kimera_stream.kernels._egress import Sink, fan_out

        COMPILED = True
    except ImportError:
        Sink, fan_out, COMPILED = PlainSink, plain_fan_out, False
