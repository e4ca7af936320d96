"""The way out of the process, as the streaming core sees it: one handle per connection, bytes in, nothing awaited."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from kimera_stream.protocol.close_codes import CloseCode

FanOut = Callable[[list["Egress"], bytes], None]
"""Writes the same bytes to many handles: ``kernels.egress.fan_out`` or something of the same shape."""


class EgressListener(Protocol):
    """Who is told when a handle's buffer fills or drains. Called on the event loop, from within ``write`` or later."""

    def egress_paused(self) -> None: ...

    def egress_resumed(self) -> None: ...

    def egress_draining(self) -> None:
        """The server is stopping: finish what is in flight, then close with 4000. A deadline is already running."""


@runtime_checkable
class Egress(Protocol):
    """A connection's outgoing side. No method blocks, and none raises once the connection is gone: bytes are dropped then.

    ``frames`` are whole WebSocket frames (``protocol.frames``), any number joined.
    """

    @property
    def fd(self) -> int:
        """The socket's descriptor if bytes may be handed to it directly while nothing is buffered, otherwise -1.

        A handle with a descriptor also has the ``transport`` that owns it.
        """

    @property
    def buffered(self) -> int:
        """Bytes written and not yet taken by the operating system."""

    @property
    def paused(self) -> bool:
        """Whether the buffer is above its high-water mark."""

    @property
    def closing(self) -> bool:
        """Whether close or abort was called, or the peer went away."""

    def listen(self, listener: EgressListener | None) -> None:
        """Tell ``listener`` of pauses and resumptions from now on; None: nobody."""

    def write(self, frames: bytes) -> None: ...

    def close(self, code: CloseCode, reason: str) -> None:
        """Send a close frame after what is buffered; abort if the peer does not let it through within a deadline."""

    def abort(self) -> None:
        """Drop the connection now, with whatever is buffered."""
