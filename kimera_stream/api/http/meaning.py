"""/v1/score, /v1/search and /v1/watches."""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.http.content import MSGPACK, decode, read_body, request_encoding
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.core.validation import check_one_of
from kimera_stream.engines.queries import MOST_RESULTS
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.objects import GeoidBody, ScoredGeoid, ScoreResult, Watch, WatchKind

Score = Annotated[float, Meta(ge=0, le=1)]


class ScoreBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    a: GeoidBody
    b: GeoidBody


class ScoreQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    explain: Annotated[
        bool, Meta(description="1: with `stages`: what each stage of the cascade said, and how long it took.")
    ] = False


class SearchBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of text and vector."""

    text: str | None = None
    vector: list[float] | None = None
    relation: WatchKind = "related"
    k: Annotated[int, Meta(ge=1, le=MOST_RESULTS)] = 10
    filter: dict[str, Any] | None = None


class SearchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Hits, best first. Never continued: ``next`` is there because lists have it."""

    items: list[ScoredGeoid]
    next: None = None


class WatchBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of text and vector."""

    watch: str
    text: str | None = None
    vector: list[float] | None = None
    kinds: Annotated[list[WatchKind], Meta(min_length=1, max_length=2)]
    min_score: Score | None = None
    filter: dict[str, Any] | None = None


class WatchAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A watch and the channel of its matches."""

    id: str
    watch: str
    channel: str
    text: str | None = None
    kinds: list[WatchKind]
    min_score: float | None = None
    filter: dict[str, Any] | None = None
    created_at: int


class WatchList(msgspec.Struct, frozen=True, kw_only=True):
    """All watches of the caller. Never continued: ``next`` is there because lists have it."""

    items: list[WatchAnswer]
    next: None = None


class UnwatchQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    watch: Annotated[str, Meta(description="Name of the watch; may come in the body instead.")] | None = None


class UnwatchBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    watch: str


class UnwatchedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    watch: str


async def score(call: Call) -> ASGIApp:
    body = await call.body(ScoreBody)
    explain = call.query(ScoreQuery).explain
    return call.answer(await call.open_services.knowledge.score(body.a, body.b, explain=explain))


async def search(call: Call) -> ASGIApp:
    body = await call.body(SearchBody)
    check_one_of(body.text, body.vector)
    call.open_services.hub.compile(body.filter)
    hits = await call.open_services.knowledge.search(
        text=body.text, vector=body.vector, relation=body.relation, k=body.k, filter=body.filter
    )
    return call.answer(SearchAnswer(items=hits))


async def add_watch(call: Call) -> ASGIApp:
    body = await call.body(WatchBody)
    check_id(body.watch, "watch", what="a name of")
    check_one_of(body.text, body.vector)
    call.open_services.hub.compile(body.filter)
    watch = await call.open_services.knowledge.watch(
        body.watch,
        principal=call.principal,
        text=body.text,
        vector=body.vector,
        kinds=body.kinds,
        min_score=body.min_score,
        filter=body.filter,
    )
    return call.answer(_watch_answer(watch), status=201)


async def list_watches(call: Call) -> ASGIApp:
    found = await call.open_services.knowledge.watches(principal=call.principal)
    return call.answer(WatchList(items=[_watch_answer(watch) for watch in found]))


async def remove_watch(call: Call) -> ASGIApp:
    name = call.query(UnwatchQuery).watch
    if name is None:
        data = await read_body(call.request, call.door.settings.api.max_body_bytes)
        if not data:
            raise BadRequestError("watch: expected the name of a watch", field="watch")
        name = decode(data, UnwatchBody, request_encoding(call.request)).watch
    check_id(name, "watch", what="a name of")
    await call.open_services.knowledge.unwatch(name, principal=call.principal)
    return call.answer(UnwatchedAnswer(watch=name))


def _watch_answer(watch: Watch) -> WatchAnswer:
    return WatchAnswer(
        id=watch.id,
        watch=watch.watch,
        channel=f"watch:{watch.id}",
        text=watch.text,
        kinds=watch.kinds,
        min_score=watch.min_score,
        filter=watch.filter,
        created_at=watch.created_at,
    )


OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/score",
        name="scorePair",
        summary="How two statements stand to each other",
        description="Stores nothing.",
        handler=score,
        tag="meaning",
        role="subscribe",
        query=ScoreQuery,
        body=(Content(ScoreBody), Content(ScoreBody, MSGPACK)),
        answers={200: Answer("The score and its parts", (Content(ScoreResult), Content(ScoreResult, MSGPACK)))},
        fails=(408, 413, 415),
    ),
    Operation(
        method="POST",
        path="/v1/search",
        name="searchGeoids",
        summary="Find statements that are related to one, or contradict it",
        description=(
            "With a filter the 10,000 most related statements are looked at, as far as needed to find `k` that pass: fewer hits "
            "mean that no more of these pass. Of `contradicts` what a publish of the statement would find is looked at."
        ),
        handler=search,
        tag="meaning",
        role="subscribe",
        body=(Content(SearchBody), Content(SearchBody, MSGPACK)),
        answers={200: Answer("Hits, best first", (Content(SearchAnswer), Content(SearchAnswer, MSGPACK)))},
        fails=(408, 413, 415),
    ),
    Operation(
        method="GET",
        path="/v1/watches",
        name="listWatches",
        summary="List the caller's watches",
        handler=list_watches,
        tag="meaning",
        role="subscribe",
        answers={200: Answer("The watches", (Content(WatchList), Content(WatchList, MSGPACK)))},
    ),
    Operation(
        method="POST",
        path="/v1/watches",
        name="addWatch",
        summary="Watch for statements that contradict or relate to one",
        description="Its matches come on the channel of the answer. A name that the caller has is replaced.",
        handler=add_watch,
        tag="meaning",
        role="subscribe",
        body=(Content(WatchBody), Content(WatchBody, MSGPACK)),
        answers={201: Answer("Watching", (Content(WatchAnswer), Content(WatchAnswer, MSGPACK)))},
        fails=(408, 409, 413, 415),
    ),
    Operation(
        method="DELETE",
        path="/v1/watches",
        name="removeWatch",
        summary="Stop watching",
        handler=remove_watch,
        tag="meaning",
        role="subscribe",
        query=UnwatchQuery,
        body=(Content(UnwatchBody), Content(UnwatchBody, MSGPACK)),
        body_required=False,
        answers={200: Answer("No longer watching", (Content(UnwatchedAnswer), Content(UnwatchedAnswer, MSGPACK)))},
        fails=(404, 408, 413, 415),
    ),
)
