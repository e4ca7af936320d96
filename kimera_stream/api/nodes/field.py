"""The field, as an edge knows it: the newest value that the leading engine has told, and shares for those who have not heard it.

A field at rest is told once and then no more, so what the bus loses is asked for: at once where a loss is known, and now and then.
"""

from contextlib import suppress
from typing import Final

import anyio
import msgspec

from kimera_stream.core.interfaces import EventSink
from kimera_stream.infrastructure.bus.interface import FIELD, Bus
from kimera_stream.protocol.errors import OverloadedError, UnavailableError
from kimera_stream.protocol.objects import FieldState

NEWEST = "newest"
"""Key under which an engine shares its newest value, for edges that come later or have missed it."""
EVERY: Final = 5.0
"""Seconds after which the shared value is looked at, whatever was heard."""


class FieldValue(msgspec.Struct, frozen=True, array_like=True):
    """``data``: JSON of a ``FieldState``, as of ``offset``."""

    offset: int
    type: str
    data: bytes


encode_value = msgspec.msgpack.Encoder().encode
_decode_value = msgspec.msgpack.Decoder(FieldValue).decode
_state = msgspec.json.Decoder(FieldState).decode


class RemoteField:
    """Implements ``core.interfaces.FieldService``; passes values on to ``sink``."""

    def __init__(self, bus: Bus, sink: EventSink) -> None:
        self._bus = bus
        self._sink = sink
        self._value: FieldValue | None = None
        self._age = (-1, 0)
        """Of the value: its offset, and when it was made (unix ms)."""
        self._stale = anyio.Event()

    async def load(self) -> None:
        """Ask what the engines said last; nothing, where the bus is away or full."""
        try:
            shared = await self._bus.gather(FIELD, NEWEST)
        except (UnavailableError, OverloadedError):
            return
        for value in shared.values():
            with suppress(
                msgspec.MsgspecError
            ):  # an engine of another version: what it tells is reported where it is heard
                self.heard(value)

    def stale(self) -> None:
        """A value may have been missed: ``run`` looks."""
        self._stale.set()

    async def run(self) -> None:
        """Look at the shared value when one may have been missed, and now and then, until cancelled."""
        while True:
            with anyio.move_on_after(EVERY):
                await self._stale.wait()
            self._stale = anyio.Event()
            await self.load()

    def heard(self, message: bytes) -> None:
        """A value as an engine tells it. One that is not newer is passed over: an engine that led may be late, or not know yet."""
        value = _decode_value(message)
        age = (value.offset, _state(value.data).updated_at)
        if age > self._age:
            self._value, self._age = value, age
            self._sink.latest("field", value.type, value.data, offset=value.offset)

    def state(self) -> FieldState:
        """The newest value.

        Raises:
            UnavailableError: no engine has told any yet.
        """
        if self._value is None:
            raise UnavailableError("field: no engine has told a value yet", retry_after=1.0)
        return _state(self._value.data)
