"""The field, as an edge knows it: the newest value that the leading engine has told."""

import msgspec

from kimera_stream.core.interfaces import EventSink
from kimera_stream.infrastructure.bus.interface import FIELD, Bus
from kimera_stream.protocol.errors import OverloadedError, UnavailableError
from kimera_stream.protocol.objects import FieldState

NEWEST = "newest"
"""Key under which an engine shares its newest value, for edges that come later."""


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

    async def load(self) -> None:
        """Ask what the engines said last; nothing, where the bus is away or full."""
        try:
            shared = await self._bus.gather(FIELD, NEWEST)
        except (UnavailableError, OverloadedError):
            return
        values = sorted((_decode_value(each) for each in shared.values()), key=lambda value: value.offset)
        if values and (self._value is None or values[-1].offset > self._value.offset):
            self._pass_on(values[-1])

    def heard(self, message: bytes) -> None:
        """A value told on the bus."""
        self._pass_on(_decode_value(message))

    def _pass_on(self, value: FieldValue) -> None:
        self._value = value
        self._sink.latest("field", value.type, value.data, offset=value.offset)

    def state(self) -> FieldState:
        """The newest value.

        Raises:
            UnavailableError: no engine has told any yet.
        """
        if self._value is None:
            raise UnavailableError("field: no engine has told a value yet", retry_after=1.0)
        return _state(self._value.data)
