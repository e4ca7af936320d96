"""Where a subscription starts: live, at a position, or some events back."""

import msgspec

from kimera_stream.core.interfaces import KnowledgeService, LogReader
from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.protocol.channels import channel_kind
from kimera_stream.protocol.errors import BadPositionError, BadRequestError, NotFoundError
from kimera_stream.protocol.objects import Position


class Start(msgspec.Struct, frozen=True, gc=False):
    """Where a subscription starts. ``position`` None: at the live edge, wherever that is when it begins."""

    position: int | None
    was_recovering: bool = False
    recovered: bool = False


def unknown_watch(knowledge: KnowledgeService, channel: str) -> str | None:
    """The id of the watch whose channel it is, if this node knows of none such."""
    prefix, _, watch_id = channel.partition(":")
    return watch_id if prefix == "watch" and watch_id and knowledge.watch_owner(watch_id) is None else None


async def require_watch(knowledge: KnowledgeService, channel: str) -> None:
    """Refuse the channel of a watch that does not exist: nothing would ever come, where every other channel's thing may yet.

    Raises:
        NotFoundError: there is no such watch.
        UnavailableError: other nodes keep watches too, and at present nobody can say.
    """
    watch_id = unknown_watch(knowledge, channel)
    if watch_id is not None and await knowledge.find_watch(watch_id) is None:
        raise NotFoundError(f"channel: there is no watch {watch_id[:128]!r}; `watch` makes one", field="channel")


async def resolve(
    log: LogReader,
    settings: StreamSettings,
    channel: str,
    since: Position | None,
    rewind: int | None,
    *,
    flushed: int,
    head: int,
) -> Start:
    """The start that ``since`` or ``rewind`` asks for.

    Recovery is all or nothing: of another epoch, or older than what the log keeps, a position is not recovered from at all.

    Args:
        flushed: The live edge.
        head: The newest offset that anyone may know of.

    Raises:
        BadChannelError: there is no such channel.
        BadPositionError: ``since`` is ahead of the log.
        BadRequestError: both were given, or ``rewind`` is too long.
    """
    kind = channel_kind(channel, max_bytes=settings.max_channel_bytes)
    if since is not None and rewind is not None:
        raise BadRequestError("rewind: give either since or rewind, not both", field="rewind")
    if rewind is not None and rewind > settings.history_page:
        raise BadRequestError(f"rewind: expected at most {settings.history_page}", field="rewind")
    recovery = None if since is None else _recover(log, since, head)
    if kind == "latest":  # nothing to replay: the newest value is what was missed
        return Start(None)
    if recovery is not None:
        return recovery
    if rewind:
        return Start(await _before_the_last(log, channel, rewind, flushed))
    return Start(None)


async def _before_the_last(log: LogReader, channel: str, count: int, until: int) -> int:
    """The position before the last ``count`` events up to ``until``, or before all of them where there are fewer."""
    position, more = until, True
    while more and count:
        page = await log.read(channel, after=log.trimmed, limit=count, until=until, reverse=True)
        if page.entries:
            position = page.entries[-1].offset - 1
        count -= len(page.entries)
        until, more = page.scanned - 1, page.more  # a page of large entries ends early
    return position


def _recover(log: LogReader, since: Position, head: int) -> Start:
    if since.offset < 0:
        raise BadPositionError("since.offset: expected an offset of 0 or more", field="since.offset")
    if since.epoch != log.epoch or since.offset < log.trimmed:
        return Start(None, was_recovering=True)
    if since.offset > head:
        raise BadPositionError(
            f"since.offset: {since.offset} is ahead of the log, whose newest entry is {head}", field="since.offset"
        )
    return Start(since.offset, was_recovering=True, recovered=True)
