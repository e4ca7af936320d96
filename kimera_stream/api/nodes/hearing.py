"""What an edge hears on the bus, handed to whom it concerns."""

from typing import Final

import anyio
import msgspec
import structlog

from kimera_stream.api.nodes.field import RemoteField
from kimera_stream.core.relay import unpack_entries
from kimera_stream.engines.cluster.errands import Errands
from kimera_stream.engines.cluster.scored import Scored
from kimera_stream.engines.cluster.watchlist import WatchList
from kimera_stream.engines.cluster.wire import decode_answers, decode_progress
from kimera_stream.infrastructure.bus.interface import FIELD, LOG, NUDGE, PROGRESS, Bus, Lost, replies
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.streaming.following import Following

log = structlog.get_logger(__name__)

AGAIN: Final = 1.0
"""Seconds after which watches that could not be read are read again."""


class Hearing:
    """The one reader of an edge's topics. ``run`` is a supervised service."""

    def __init__(
        self,
        bus: Bus,
        following: Following,
        errands: Errands,
        scored: Scored,
        watches: WatchList,
        field: RemoteField,
    ) -> None:
        self._bus = bus
        self._following = following
        self._errands = errands
        self._scored = scored
        self._watches = watches
        self._field = field
        self._replies = replies(bus.node)

    async def run(self) -> None:
        """Listen until cancelled."""
        topics = (LOG, PROGRESS, FIELD, NUDGE, self._replies)
        async with self._bus.follow(*topics) as follower:
            for topic in topics:  # of what was said before, nothing was heard
                self._lost(topic)
            while True:
                for each in await follower.receive():
                    if isinstance(each, Lost):
                        self._lost(each.topic)
                        continue
                    try:
                        self._take_in(each.topic, each.payload)
                    except msgspec.MsgspecError as error:
                        log.error("a message on the bus cannot be read", topic=each.topic, error=str(error))  # noqa: TRY400
                        self._lost(each.topic)

    def _lost(self, topic: str) -> None:
        if topic == LOG:
            self._following.lost()
        elif topic == PROGRESS:
            self._scored.lost()
        elif topic == self._replies:
            self._errands.lost()
        elif topic == FIELD:
            self._field.stale()
        elif topic == NUDGE:
            self._nudged()

    def _nudged(self) -> None:
        """Watches or coverage have changed."""
        self._watches.stale()
        self._scored.lost()

    def _take_in(self, topic: str, payload: bytes) -> None:
        if topic == LOG:
            self._following.heard(unpack_entries(payload))
        elif topic == PROGRESS:
            self._scored.heard(decode_progress(payload))
        elif topic == self._replies:
            self._errands.heard(decode_answers(payload))
        elif topic == FIELD:
            self._field.heard(payload)
        elif topic == NUDGE:
            self._nudged()


async def keep_watches(watches: WatchList) -> None:
    """Read the watches again whenever they may have changed, until cancelled."""
    while True:
        await watches.turned_stale()
        try:
            await watches.load()
        except UnavailableError as error:
            log.info("watches are read again later", error=error.message)
            watches.stale()
            await anyio.sleep(AGAIN)
