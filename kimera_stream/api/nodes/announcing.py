"""What an engine tells the others: entries it has committed, and the field where it leads."""

from collections.abc import Callable, Sequence

from kimera_stream.api.nodes.field import NEWEST, FieldValue, encode_value
from kimera_stream.core.relay import pack_entries
from kimera_stream.infrastructure.bus.interface import FIELD, LOG, Bus
from kimera_stream.protocol.log import LogEntry


class Announcing:
    """Implements ``core.interfaces.EventSink`` on the bus.

    Args:
        leads: Whether this engine is the one whose field is told.
    """

    def __init__(self, bus: Bus, leads: Callable[[], bool]) -> None:
        self._bus = bus
        self._leads = leads

    def deliver(self, entries: Sequence[LogEntry]) -> None:
        """Tell of entries that are committed."""
        for message in pack_entries(entries):
            self._bus.publish(LOG, message)

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        """Tell the newest field."""
        if channel != FIELD:
            return
        if not self._leads():
            self._bus.share(FIELD, NEWEST, None)
            return
        value = encode_value(FieldValue(offset, type, data))
        self._bus.publish(FIELD, value)
        self._bus.share(FIELD, NEWEST, value)
