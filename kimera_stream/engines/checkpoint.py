"""Accepted publishes that a graceful stop left undone: kept as rows in the vault, taken up by the next start.

Only those with an idempotency key: their senders were told to repeat them, and without a key a repetition would be a second
statement. What was being committed when the time ran out is not kept either: it may be in the log.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from kimera_stream.core.geoid import unit
from kimera_stream.core.interfaces import CheckpointRequest, Principal, PublishResult, VaultService
from kimera_stream.core.validation import BodyLimits, validate_body
from kimera_stream.engines.intake import Ticket
from kimera_stream.engines.work import PublishWork, Work
from kimera_stream.protocol.errors import BadRequestError, TooLargeError, UnavailableError
from kimera_stream.protocol.objects import GeoidBody

log = structlog.get_logger(__name__)

MOST = 100_000

_body = msgspec.json.Decoder(GeoidBody).decode
_encode = msgspec.json.Encoder().encode


async def keep(vault: VaultService, works: Iterable[Work], *, now: int) -> None:
    """Keep what can be kept of unfinished work, in its order, and answer it so. What goes wrong is told, not raised.

    Args:
        vault: Where to.
        works: None of it may be carried out after this.
        now: Unix ms.
    """
    kept = [work for work in works if isinstance(work, PublishWork) and work.key and not work.ticket.finished]
    if not kept:
        return
    try:
        await vault.save_checkpoint([_request(work, now) for work in kept])
    except UnavailableError as error:
        log.warning("accepted work could not be kept for the next start", requests=len(kept), error=error.message)
        return
    log.info("accepted work kept for the next start", requests=len(kept))
    for work in kept:
        work.ticket.refuse(
            UnavailableError(
                "the server stopped before this was done; it is kept, and done when the server starts again: "
                "repeat the request with its key to hear what became of it",
                retry_after=1.0,
            )
        )


async def left_behind(
    vault: VaultService, limits: BodyLimits, *, cost: Callable[[GeoidBody], int]
) -> Sequence[PublishWork]:
    """What the last stop kept, in its order; the vault forgets it. What the limits no longer allow is told and left out.

    Raises:
        UnavailableError: the vault cannot be read or written.
    """
    works: dict[tuple[str, str], PublishWork] = {}
    taken = await vault.take_up(due=None, held_until=0, limit=MOST)
    await vault.settle([request.ref for request in taken if request.ref is not None])
    for request in taken:
        try:
            body = _body(request.body)
            validate_body(body, limits, merge=request.merge)
        except (BadRequestError, TooLargeError, msgspec.MsgspecError) as error:
            log.warning("kept work is no longer valid", error=type(error).__name__)
            continue
        work = _work(request, body, cost(body))
        works[request.principal, request.key or ""] = work
    return list(works.values())


def _request(work: PublishWork, now: int) -> CheckpointRequest:
    return CheckpointRequest(
        principal=work.principal.id,
        body=_encode(work.body),
        session_id=work.session_id,
        key=work.key,
        priority=work.ticket.priority,
        merge=work.merge,
        must_exist=work.must_exist,
        accepted_at=now,
    )


def _work(request: CheckpointRequest, body: GeoidBody, cost: int) -> PublishWork:
    session = body.session_id or request.session_id or ""
    ticket: Ticket[PublishResult] = Ticket(
        (request.principal, session), priority=request.priority, cost=cost, admitted_at=time.monotonic()
    )
    principal = Principal(request.principal, frozenset({"publish"}))
    work = PublishWork(ticket, body, principal, request.session_id, request.key, request.merge, request.must_exist)
    if body.vector is not None:
        work.vector = unit(body.vector)
    return work
