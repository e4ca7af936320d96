"""/v1/revocations: tokens that shall not count any longer."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from kimera_stream.api.auth.revoking import subject_of
from kimera_stream.api.http.content import MSGPACK
from kimera_stream.api.http.operations import Answer, Call, Content, Operation
from kimera_stream.core.kept import RevocationKind
from kimera_stream.core.validation import check_encodable
from kimera_stream.protocol.errors import BadRequestError

MAX_PRINCIPAL: Final = 255


class RevocationBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either ``principal`` or ``token``."""

    principal: (
        Annotated[str, Meta(min_length=1, description="Revoke every token issued to this principal so far.")] | None
    ) = None
    token: (
        Annotated[str, Meta(min_length=1, description="Revoke one: an API key, the id of one, or a JSON Web Token.")]
        | None
    ) = None


class RevocationAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """``subject``: the principal, the id of the API key, or the SHA-256 of what a JSON Web Token signs. ``revoked_at`` in unix ms."""

    kind: RevocationKind
    subject: str
    revoked_at: int


async def revoke(call: Call) -> ASGIApp:
    body = await call.body(RevocationBody)
    kind, subject, expires_at = _subject(body)
    made = await call.open_services.revoker.revoke(kind, subject, by=call.principal.id, expires_at=expires_at)
    return call.answer(RevocationAnswer(kind=made.kind, subject=made.subject, revoked_at=made.revoked_at), status=201)


def _subject(body: RevocationBody) -> tuple[RevocationKind, str, int | None]:
    if (body.principal is None) == (body.token is None):
        raise BadRequestError("principal: expected either principal or token", field="principal")
    if body.token is not None:
        try:
            return subject_of(body.token)
        except ValueError as error:
            raise BadRequestError(f"token: {error}", field="token") from None
    assert body.principal is not None
    check_encodable(body.principal, "principal")
    if len(body.principal) > MAX_PRINCIPAL:
        raise BadRequestError(f"principal: expected at most {MAX_PRINCIPAL} characters", field="principal")
    return "principal", body.principal, None


OPERATIONS: Final = (
    Operation(
        method="POST",
        path="/v1/revocations",
        name="revokeTokens",
        summary="Let a token, or all tokens of a principal, count no longer",
        description=(
            "On this node at once, on every other within a second or so. Connections that came in by it are closed with 4003 "
            "(`token_revoked`), event streams end. Cannot be taken back: issue a new token. A principal's tokens count again "
            "if they say that they were issued later (`iat`)."
        ),
        handler=revoke,
        tag="operations",
        role="admin",
        body=(Content(RevocationBody), Content(RevocationBody, MSGPACK)),
        answers={201: Answer("Revoked", (Content(RevocationAnswer), Content(RevocationAnswer, MSGPACK)))},
        fails=(408, 413, 415),
    ),
)
