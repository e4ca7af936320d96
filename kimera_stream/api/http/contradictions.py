"""/v1/contradictions and /v1/scars."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.http.content import MSGPACK
from kimera_stream.api.http.geoids import After, ContradictionPage, Fraction, Limit
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.core.validation import MAX_REASON_CHARS
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import NotFoundError
from kimera_stream.protocol.objects import Contradiction, ContradictionState, Decision, Scar


class ContradictionsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: After = 0
    limit: Limit = 100
    state: ContradictionState | None = None
    min_score: Annotated[Fraction, Meta(description="Only contradictions with at least this score.")] | None = None
    geoid_id: Annotated[str, Meta(description="Only contradictions that this geoid takes part in.")] | None = None


class ScarsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after: After = 0
    limit: Limit = 100


class ScarPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page in offset order; ``next`` is the ``after`` of the next page, null at the end."""

    items: list[Scar]
    next: int | None


class ResolveBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    decision: Decision
    reason: Annotated[str, Meta(max_length=MAX_REASON_CHARS)] | None = None


class ResolvedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    scar: Scar
    offset: int


async def list_contradictions(call: Call) -> ASGIApp:
    query = call.query(ContradictionsQuery)
    if query.geoid_id is not None:
        check_id(query.geoid_id, "geoid_id")
    page = await call.open_services.vault.list_contradictions(
        after=query.after, limit=query.limit, state=query.state, min_score=query.min_score, geoid_id=query.geoid_id
    )
    return call.answer(ContradictionPage(items=page.items, next=page.next))


async def get_contradiction(call: Call) -> ASGIApp:
    contradiction_id = call.path_id()
    contradiction = await call.open_services.vault.contradiction(contradiction_id)
    if contradiction is None:
        raise NotFoundError(f"id: there is no contradiction {contradiction_id}", field="id")
    return call.answer(contradiction)


async def resolve(call: Call) -> ASGIApp:
    contradiction_id = call.path_id()
    body = await call.body(ResolveBody)
    scar, offset = await call.open_services.knowledge.resolve(
        contradiction_id, body.decision, body.reason, principal=call.principal
    )
    return call.answer(ResolvedAnswer(scar=scar, offset=offset))


async def list_scars(call: Call) -> ASGIApp:
    query = call.query(ScarsQuery)
    page = await call.open_services.vault.list_scars(after=query.after, limit=query.limit)
    return call.answer(ScarPage(items=page.items, next=page.next))


_PATH: Final = {"id": "Id of the contradiction."}

OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/contradictions",
        name="listContradictions",
        summary="List contradictions in offset order",
        handler=list_contradictions,
        tag="contradictions",
        role="subscribe",
        query=ContradictionsQuery,
        answers={200: Answer("A page", (Content(ContradictionPage), Content(ContradictionPage, MSGPACK)))},
    ),
    Operation(
        method="GET",
        path="/v1/contradictions/{id}",
        name="getContradiction",
        summary="Read a contradiction",
        handler=get_contradiction,
        tag="contradictions",
        role="subscribe",
        path_fields=_PATH,
        answers={200: Answer("The contradiction", (Content(Contradiction), Content(Contradiction, MSGPACK)))},
        fails=(404,),
    ),
    Operation(
        method="POST",
        path="/v1/contradictions/{id}/resolve",
        name="resolveContradiction",
        summary="Resolve a contradiction, which leaves a scar",
        handler=resolve,
        tag="contradictions",
        role="resolve",
        path_fields=_PATH,
        body=(Content(ResolveBody), Content(ResolveBody, MSGPACK)),
        answers={200: Answer("Resolved", (Content(ResolvedAnswer), Content(ResolvedAnswer, MSGPACK)))},
        fails=(404, 408, 409, 413, 415),
    ),
    Operation(
        method="GET",
        path="/v1/scars",
        name="listScars",
        summary="List scars in offset order",
        handler=list_scars,
        tag="contradictions",
        role="subscribe",
        query=ScarsQuery,
        answers={200: Answer("A page", (Content(ScarPage), Content(ScarPage, MSGPACK)))},
    ),
)
