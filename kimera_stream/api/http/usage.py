"""/v1/usage: what each principal published per day."""

import time
from datetime import date, timedelta
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.http.content import MSGPACK
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.core.kept import UsageRecord
from kimera_stream.core.validation import check_encodable

_DAY: Final = 86_400
_FIRST: Final = date(1970, 1, 1)


class UsageQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    days: Annotated[int, Meta(ge=1, le=3660, description="Days to show, today (UTC) included.")] = 30
    principal: Annotated[str, Meta(description="Only what this principal published.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000, description="Rows at most.")] = 1_000


class UsageDay(msgspec.Struct, frozen=True, kw_only=True):
    """What a principal published on one day (UTC). ``text_bytes``: of the texts, in UTF-8. ``tokens``: as the encoder counted them."""

    principal: str
    day: Annotated[str, Meta(description="As in 2026-03-01.", pattern=r"^\d{4}-\d{2}-\d{2}$")]
    statements: int
    text_bytes: int
    tokens: int
    bytes: Annotated[
        int,
        Meta(
            description="Of the statements as they are stored: texts, states and metadata as JSON, and 4 for each number of a vector that was brought along."
        ),
    ]


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """By principal and day. ``more``: there are further rows; ask for one principal, or for fewer days."""

    items: list[UsageDay]
    more: bool


async def usage(call: Call) -> ASGIApp:
    query = call.query(UsageQuery)
    if query.principal is not None:
        check_encodable(query.principal, "principal")
    first = int(time.time() // _DAY) - query.days + 1
    rows = await call.open_services.vault.usage(since_day=first, principal=query.principal, limit=query.limit + 1)
    return call.answer(UsageReport(items=[_day(row) for row in rows[: query.limit]], more=len(rows) > query.limit))


def _day(row: UsageRecord) -> UsageDay:
    return UsageDay(
        principal=row.principal,
        day=(_FIRST + timedelta(days=row.day)).isoformat(),
        statements=row.statements,
        text_bytes=row.text_bytes,
        tokens=row.tokens,
        bytes=row.bytes,
    )


OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/usage",
        name="getUsage",
        summary="What each principal published per day",
        description="Statements, bytes of their texts and of all that was said, and tokens that the encoder read (0 for a statement with its own "
        "vector; where a service encodes: each statement's share, by length, of the tokens that the service counted, or an approximation).",
        handler=usage,
        tag="operations",
        role="admin",
        query=UsageQuery,
        answers={200: Answer("By principal and day", (Content(UsageReport), Content(UsageReport, MSGPACK)))},
    ),
)
