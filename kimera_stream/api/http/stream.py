"""/v1/events, /v1/history, /v1/stats and /v1/field: what happened and what happens."""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.http.content import EVENT_STREAM, JSON, MSGPACK, answer_encoding, decode
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.api.http.sse import EventStream, parse_position
from kimera_stream.protocol.errors import BadFilterError, BadRequestError, UnavailableError
from kimera_stream.protocol.filters import Filter
from kimera_stream.protocol.messages import Event
from kimera_stream.protocol.objects import FieldState
from kimera_stream.streaming.starts import require_watch

ChannelName = Annotated[
    str, Meta(description="geoids, contradictions, scars, field, stats, geoid:<id>, session:<id>, ...")
]
Since = Annotated[str, Meta(description="`epoch:offset`: begin after this position.")]


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channel: ChannelName
    since: Since | None = None
    filter: Annotated[str, Meta(description="A filter tree as JSON.")] | None = None
    rewind: Annotated[int, Meta(ge=0, description="Begin this many events back.")] | None = None


class HistoryQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channel: ChannelName
    since: Since | None = None
    limit: Annotated[int, Meta(ge=1, description="Events at most, up to the configured page (1000).")] = 100
    reverse: Annotated[bool, Meta(description="Newest first.")] = False


class HistoryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a channel's past; ``offset`` is where to go on from."""

    events: list[msgspec.Raw]
    epoch: str
    offset: int
    more: bool


class HistoryDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a channel's past; ``offset`` is where to go on from (in reverse: the newest entry looked at)."""

    events: list[Event]
    epoch: str
    offset: int
    more: bool


async def events(call: Call) -> ASGIApp:
    query = call.query(EventsQuery)
    last = call.request.headers.get("last-event-id")
    named, given = ("last-event-id", last) if last else ("since", query.since)
    since = None if given is None else parse_position(given, named)
    if query.rewind is not None and query.since is not None:
        raise BadRequestError("rewind: expected either since or rewind", field="rewind")
    await require_watch(call.open_services.knowledge, query.channel)
    return EventStream(
        call.door,
        call.open_services.hub,
        call.principal,
        channel=query.channel,
        since=since,
        since_named=named,
        filter=_filter(call, query.filter),
        rewind=None if since is not None else query.rewind,
    )


def _filter(call: Call, text: str | None) -> Filter | None:
    if text is None:
        return None
    try:
        tree = decode(text.encode(), dict[str, Any], "json", where="filter")
    except (BadRequestError, UnicodeEncodeError) as error:
        raise BadFilterError(f"filter: expected a filter tree as JSON ({error})", field="filter") from error
    return call.open_services.hub.compile(tree)


async def history(call: Call) -> ASGIApp:
    query = call.query(HistoryQuery)
    page = await call.open_services.commands.history(
        query.channel,
        since=None if query.since is None else parse_position(query.since, "since"),
        limit=query.limit,
        reverse=query.reverse,
        principal=call.principal,
        encoding=answer_encoding(call.request),
    )
    return call.answer(HistoryAnswer(events=page.events, epoch=page.epoch, offset=page.offset, more=page.more))


async def stats(call: Call) -> ASGIApp:
    value = call.open_services.hub.newest("stats")
    if value is None:
        raise UnavailableError("stats: no value yet", retry_after=call.door.settings.stream.stats_interval)
    return call.answer(msgspec.json.decode(value))


async def field(call: Call) -> ASGIApp:
    value = call.open_services.hub.newest("field")
    if value is None:
        return call.answer(call.open_services.field.state())
    return call.answer(msgspec.json.decode(value))


OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/events",
        name="streamEvents",
        summary="Events of a channel as Server-Sent Events",
        description=(
            "Each event has `id: epoch:offset`, its type as `event:` and the event object as `data:`. The first is `subscribed`: "
            "where the stream starts and whether it `recovered`. `Last-Event-ID` resumes and goes before `since`. In quiet a heartbeat "
            "brings an `id:` without an event: the position up to which nothing more passes the filter."
        ),
        handler=events,
        tag="stream",
        role="subscribe",
        query=EventsQuery,
        header_fields={"Last-Event-ID": "`epoch:offset` of the last event seen."},
        answers={200: Answer("Events, until the client leaves or the server stops", (Content(Event, EVENT_STREAM),))},
        fails=(404,),
    ),
    Operation(
        method="GET",
        path="/v1/history",
        name="readHistory",
        summary="A page of a channel's past",
        handler=history,
        tag="stream",
        role="subscribe",
        query=HistoryQuery,
        answers={200: Answer("A page", (Content(HistoryDocument), Content(HistoryDocument, MSGPACK)))},
    ),
    Operation(
        method="GET",
        path="/v1/stats",
        name="getStats",
        summary="Newest value of the stats channel",
        handler=stats,
        tag="stream",
        role="subscribe",
        answers={200: Answer("Rates, queue depths, latency quantiles, subscribers", (Content(dict[str, Any], JSON),))},
    ),
    Operation(
        method="GET",
        path="/v1/field",
        name="getField",
        summary="Newest value of the field channel",
        handler=field,
        tag="stream",
        role="subscribe",
        answers={
            200: Answer("The thermodynamics of the whole field", (Content(FieldState), Content(FieldState, MSGPACK)))
        },
    ),
)
