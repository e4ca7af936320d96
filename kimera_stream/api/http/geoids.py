"""/v1/geoids: publish one, several or a stream; read, update and delete."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.http.content import (
    MSGPACK,
    NDJSON,
    decode,
    is_ndjson,
    read_body,
    request_encoding,
)
from kimera_stream.api.http.ndjson import NdjsonExchange
from kimera_stream.api.http.operations import Answer, Call, Content, ListOf, OneOf, Operation
from kimera_stream.api.http.publishing import (
    LineProblem,
    OrderedPublisher,
    PublishedAnswer,
    PublishItem,
    parse_item,
    published_answer,
)
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import BadRequestError, NotFoundError, OperationalError, TooLargeError
from kimera_stream.protocol.messages import Encoding
from kimera_stream.protocol.objects import Contradiction, ContradictionState, Geoid, GeoidBody

After = Annotated[int, Meta(ge=0, le=2**63 - 1, description="Offset after which the page begins: `next` of the last.")]
Limit = Annotated[int, Meta(ge=1, le=1000, description="Items in the page at most.")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
MOST_AT_ONCE: Final = 10_000
"""Statements in one array."""
_ARRAY_BYTES: Final = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})
"""First bytes of a MessagePack array."""


class GeoidsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: After = 0
    limit: Limit = 100
    session_id: Annotated[str, Meta(description="Only geoids published under this session.")] | None = None
    originator_agent_id: Annotated[str, Meta(description="Only geoids of this agent.")] | None = None


class GeoidQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vector: Annotated[bool, Meta(description="Include the vector.")] = False


class ContradictionsOfQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: After = 0
    limit: Limit = 100
    state: ContradictionState | None = None
    min_score: Fraction | None = None


class GeoidPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page in offset order; ``next`` is the ``after`` of the next page, null at the end."""

    items: list[Geoid]
    next: int | None


class ContradictionPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page in offset order; ``next`` is the ``after`` of the next page, null at the end."""

    items: list[Contradiction]
    next: int | None


class DeletedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    geoid_id: str
    offset: int


# -- publishing ----------------------------------------------------------------------------------------------------------


async def publish(call: Call) -> ASGIApp:
    if is_ndjson(call.request):
        if "idempotency-key" in call.request.headers:
            raise _key_for_one()
        return NdjsonExchange(call.door, call.open_services.knowledge, call.principal)
    encoding = request_encoding(call.request)
    data = await read_body(call.request, call.door.settings.api.max_body_bytes)
    if _is_array(data, encoding):
        return await _publish_several(call, data, encoding)
    return await _publish_one(call, data, encoding)


async def _publish_one(call: Call, data: bytes, encoding: Encoding) -> ASGIApp:
    item = parse_item(data, encoding, "")
    result = await call.open_services.knowledge.publish(
        item.geoid,
        principal=call.principal,
        key=_idempotency_key(call, item),
        priority=5 if item.priority is None else item.priority,
    )
    created = result.geoid.version == 1 and not result.duplicate
    headers = {"location": f"/v1/geoids/{result.geoid.id}"} if created else None
    return call.answer(published_answer(result), status=201 if created else 200, headers=headers)


async def _publish_several(call: Call, data: bytes, encoding: Encoding) -> ASGIApp:
    if "idempotency-key" in call.request.headers:
        raise _key_for_one()
    answers: list[PublishedAnswer | LineProblem] = []

    async def emit(result: PublishedAnswer | LineProblem) -> None:
        answers.append(result)

    items = decode(data, list[msgspec.Raw], encoding)
    if len(items) > MOST_AT_ONCE:  # every answer is kept until the last one is there
        raise TooLargeError(f"body: expected at most {MOST_AT_ONCE} statements; send more as {NDJSON}", field="body")
    async with OrderedPublisher(call.open_services.knowledge, call.principal, emit) as publisher:
        for index, raw in enumerate(items):
            try:
                item = parse_item(bytes(raw), encoding, f"[{index}]")
            except BadRequestError as error:
                await publisher.refuse(error)
            else:
                await publisher.submit(item)
    return call.answer(answers)


def _is_array(data: bytes, encoding: Encoding) -> bool:
    if encoding == "msgpack":
        return data[:1] != b"" and data[0] in _ARRAY_BYTES
    return data.lstrip(b" \t\r\n")[:1] == b"["


def _key_for_one() -> BadRequestError:
    return BadRequestError(
        'idempotency-key: the header is for one statement; send several as {"geoid": ..., "key": ...}',
        field="idempotency-key",
    )


def _idempotency_key(call: Call, item: PublishItem) -> str | None:
    given = call.request.headers.getlist("idempotency-key")
    if not given:
        return item.key
    if len(given) > 1 or not 1 <= len(given[0]) <= 255:
        raise BadRequestError("idempotency-key: expected one key of 1-255 characters", field="idempotency-key")
    if item.key is not None and item.key != given[0]:
        raise BadRequestError("key: expected the same key as in the header idempotency-key", field="key")
    return given[0]


# -- reading and changing --------------------------------------------------------------------------------------------------


async def list_geoids(call: Call) -> ASGIApp:
    query = call.query(GeoidsQuery)
    for name, value in (("session_id", query.session_id), ("originator_agent_id", query.originator_agent_id)):
        if value is not None:
            check_id(value, name)
    page = await call.open_services.vault.list_geoids(
        after=query.after, limit=query.limit, session_id=query.session_id, agent_id=query.originator_agent_id
    )
    return call.answer(GeoidPage(items=page.items, next=page.next))


async def get_geoid(call: Call) -> ASGIApp:
    query = call.query(GeoidQuery)
    geoid_id = call.path_id()
    stored = await call.open_services.vault.geoid(geoid_id)
    if stored is None:
        raise _no_geoid(geoid_id)
    geoid = stored.geoid
    if query.vector and stored.vector is not None:
        geoid = msgspec.structs.replace(geoid, vector=stored.vector.tolist())
    return call.answer(geoid)


async def update_geoid(call: Call) -> ASGIApp:
    geoid_id = call.path_id()
    body = await call.body(GeoidBody)
    if body == GeoidBody(id=body.id):
        raise BadRequestError("body: expected at least one field to change")
    if body.id is not None and body.id != geoid_id:
        raise BadRequestError(f"id: expected {geoid_id} as in the path, or none", field="id")
    result = await call.open_services.knowledge.publish(
        msgspec.structs.replace(body, id=geoid_id),
        principal=call.principal,
        key=_idempotency_key(call, PublishItem(geoid=body)),
        merge=True,
        must_exist=True,
    )
    return call.answer(published_answer(result))


async def delete_geoid(call: Call) -> ASGIApp:
    geoid_id = call.path_id()
    offset = await call.open_services.knowledge.delete(geoid_id, principal=call.principal)
    return call.answer(DeletedAnswer(geoid_id=geoid_id, offset=offset))


async def contradictions_of_geoid(call: Call) -> ASGIApp:
    query = call.query(ContradictionsOfQuery)
    geoid_id = call.path_id()
    vault = call.open_services.vault
    page = await vault.list_contradictions(
        after=query.after, limit=query.limit, state=query.state, min_score=query.min_score, geoid_id=geoid_id
    )
    if not page.items and await vault.geoid(geoid_id) is None:
        raise _no_geoid(geoid_id)
    return call.answer(ContradictionPage(items=page.items, next=page.next))


def _no_geoid(geoid_id: str) -> OperationalError:
    return NotFoundError(f"id: there is no geoid {geoid_id}", field="id")


# -- the table -------------------------------------------------------------------------------------------------------------

_PATH: Final = {"id": "Id of the geoid."}
_KEY: Final = {
    "Idempotency-Key": "A repeated key within its window returns the first result with `duplicate: true`. For one statement."
}
_SENT: Final = OneOf(GeoidBody, PublishItem, ListOf(OneOf(GeoidBody, PublishItem)))
_RESULT: Final = OneOf(PublishedAnswer, LineProblem)
_PUBLISHED: Final = (Content(PublishedAnswer), Content(PublishedAnswer, MSGPACK))
_BODY: Final = (Content(GeoidBody), Content(GeoidBody, MSGPACK))

OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/geoids",
        name="publishGeoids",
        summary="Publish one statement, several, or a stream of them",
        description=(
            "An answer means: committed to durable storage, scored, in the log at `offset`. An object is one statement, an array "
            f"several ({MOST_AT_ONCE} at most) that are worked on together, each answered in order with its result or its problem. NDJSON is a stream: one "
            "answer line per line that is not blank, in order, as they commit, with the number of its `line`. At most 256 lines "
            "are under way; a client has to read answers while it writes. Where statements come several at a time, one may also "
            "be `{geoid, key, priority}`. A given `id` that exists is an update."
        ),
        handler=publish,
        tag="geoids",
        role="publish",
        header_fields=_KEY,
        body=(
            Content(_SENT, description="One statement, or several."),
            Content(_SENT, MSGPACK),
            Content(OneOf(GeoidBody, PublishItem), NDJSON, "One statement per line."),
        ),
        answers={
            200: Answer(
                "Updated, a duplicate, or the results of several",
                (
                    Content(OneOf(PublishedAnswer, ListOf(_RESULT))),
                    Content(OneOf(PublishedAnswer, ListOf(_RESULT)), MSGPACK),
                    Content(_RESULT, NDJSON, "One answer per line."),
                ),
            ),
            201: Answer("Created", _PUBLISHED, {"Location": "Path of the geoid."}),
        },
        fails=(408, 409, 413, 415),
    ),
    Operation(
        method="GET",
        path="/v1/geoids",
        name="listGeoids",
        summary="List geoids in offset order",
        handler=list_geoids,
        tag="geoids",
        role="subscribe",
        query=GeoidsQuery,
        answers={200: Answer("A page", (Content(GeoidPage), Content(GeoidPage, MSGPACK)))},
    ),
    Operation(
        method="GET",
        path="/v1/geoids/{id}",
        name="getGeoid",
        summary="Read a geoid",
        handler=get_geoid,
        tag="geoids",
        role="subscribe",
        path_fields=_PATH,
        query=GeoidQuery,
        answers={200: Answer("The geoid", (Content(Geoid), Content(Geoid, MSGPACK)))},
        fails=(404,),
    ),
    Operation(
        method="PATCH",
        path="/v1/geoids/{id}",
        name="updateGeoid",
        summary="Update a geoid",
        description="What the body leaves out stays as it is; a state or metadata that it gives replaces the old one whole.",
        handler=update_geoid,
        tag="geoids",
        role="publish",
        path_fields=_PATH,
        header_fields=_KEY,
        body=_BODY,
        answers={200: Answer("The new version", _PUBLISHED)},
        fails=(404, 408, 409, 413, 415),
    ),
    Operation(
        method="DELETE",
        path="/v1/geoids/{id}",
        name="deleteGeoid",
        summary="Delete a geoid",
        description="Its open contradictions are dissolved.",
        handler=delete_geoid,
        tag="geoids",
        role="publish",
        path_fields=_PATH,
        answers={200: Answer("Deleted", (Content(DeletedAnswer), Content(DeletedAnswer, MSGPACK)))},
        fails=(404,),
    ),
    Operation(
        method="GET",
        path="/v1/geoids/{id}/contradictions",
        name="listContradictionsOfGeoid",
        summary="List the contradictions that a geoid takes part in",
        handler=contradictions_of_geoid,
        tag="geoids",
        role="subscribe",
        path_fields=_PATH,
        query=ContradictionsOfQuery,
        answers={200: Answer("A page", (Content(ContradictionPage), Content(ContradictionPage, MSGPACK)))},
        fails=(404,),
    ),
)
