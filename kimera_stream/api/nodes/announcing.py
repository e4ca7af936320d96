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
        self._newest: bytes | None = None
        """The field as it was last, told or not."""

    def deliver(self, entries: Sequence[LogEntry]) -> None:
        """Tell of entries that are committed."""
        for message in pack_entries(entries):
            self._bus.publish(LOG, message)

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        """Tell the newest field, where this engine leads."""
        if channel != FIELD:
            return
        self._newest = encode_value(FieldValue(offset, type, data))
        if self._leads():
            self._tell(self._newest)
        else:
            self._bus.share(FIELD, NEWEST, None)

    async def lead(self) -> None:
        """This engine leads from now on: what it had to itself is told, for a field at rest may not change for long. A duty of the leader."""
        if self._newest is not None:
            self._tell(self._newest)

    def _tell(self, value: bytes) -> None:
        self._bus.publish(FIELD, value)
        self._bus.share(FIELD, NEWEST, value)
