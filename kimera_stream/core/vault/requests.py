"""Accepted requests that the vault keeps: left behind by a stop, waiting for another attempt, or set aside as dead letters.

A kept request is a row from the moment it is kept until it is done (the transaction that commits it deletes the row) or set
aside. Who takes it up counts an attempt and holds it for a while (``not_before``): a process that dies holding it delays it, and
never loses it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import and_, bindparam, delete, exists, func, select, update

from kimera_stream.core.kept import CheckpointRequest, DeadLetter, RequestRef
from kimera_stream.core.vault import schema
from kimera_stream.infrastructure.database import Insert, Query, QueryIn, Transaction
from kimera_stream.infrastructure.database.statements import among

checkpoint, request, letter = schema.checkpoint, schema.checkpoint_request, schema.dead_letter

RETRIED_BY = "dead-letters"
"""Node of a checkpoint that a person made by having dead letters tried again."""

_SAVE_CHECKPOINT = Insert.whole(checkpoint)
_SAVE_REQUESTS = Insert.whole(request)
_LOCK = Query(select(schema.log_state.c.head).where(schema.log_state.c.id == 1).with_for_update())
_DUE = request.c.not_before <= bindparam("due")
_REQUESTS = Query(
    select(
        request.c.checkpoint_id,
        request.c.position,
        request.c.principal,
        request.c.body,
        request.c.session_id,
        request.c.idempotency_key,
        request.c.priority,
        request.c.merge,
        request.c.must_exist,
        request.c.accepted_at,
        request.c.attempts,
    )
    .join(checkpoint, checkpoint.c.id == request.c.checkpoint_id)
    .where(_DUE)
    .order_by(checkpoint.c.created_at, checkpoint.c.id, request.c.position)
    .limit(bindparam("limit"))
)
_COUNT_DUE = Query(select(func.count()).select_from(request).where(_DUE))
_COUNT_HELD = Query(select(func.count()).select_from(request).where(request.c.not_before > 0))
_RELEASE = Query(update(request).where(request.c.not_before > 0).values(not_before=0))
_THIS = and_(request.c.checkpoint_id == bindparam("checkpoint"), request.c.position == bindparam("place"))
_PUT_OFF = Query(
    update(request).where(_THIS).values(not_before=bindparam("until"), attempts=request.c.attempts + bindparam("more"))
)
_SETTLE = Query(delete(request).where(_THIS))
_DELETE_EMPTY = Query(
    delete(checkpoint).where(~exists(select(request.c.position).where(request.c.checkpoint_id == checkpoint.c.id)))
)

_LETTER_COLUMNS = tuple(letter.columns)
_SAVE_LETTERS = Insert(letter, [column.name for column in letter.columns if column.name != "id"])
_LETTERS = Query(
    select(*_LETTER_COLUMNS).where(letter.c.id > bindparam("after")).order_by(letter.c.id).limit(bindparam("limit"))
)
_LETTERS_OF = QueryIn(lambda values: select(*_LETTER_COLUMNS).where(among(letter.c.id, values)))
_COUNT_LETTERS = Query(select(func.count()).select_from(letter))
_DELETE_LETTERS = QueryIn(lambda values: delete(letter).where(among(letter.c.id, values)))
_OLDEST_LETTERS = Query(select(letter.c.id).order_by(letter.c.id).limit(bindparam("limit")))


def save_checkpoint(
    tx: Transaction, checkpoint_id: str, node: str, requests: Sequence[CheckpointRequest], now: int
) -> None:
    """Keep requests, in their order."""
    tx.insert(_SAVE_CHECKPOINT, [(checkpoint_id, node, now)])
    tx.insert(
        _SAVE_REQUESTS,
        [
            (
                checkpoint_id,
                position,
                item.principal,
                item.session_id,
                item.key,
                item.priority,
                item.attempts,
                item.merge,
                item.must_exist,
                item.accepted_at,
                item.body,
                0,
            )
            for position, item in enumerate(requests)
        ],
    )


def count_due(tx: Transaction, due: int) -> int:
    return int(tx.value(_COUNT_DUE, due=due))


def count_held(tx: Transaction) -> int:
    return int(tx.value(_COUNT_HELD))


def release(tx: Transaction) -> None:
    tx.run(_RELEASE)


def take_up(tx: Transaction, due: int, held_until: int, limit: int) -> list[CheckpointRequest]:
    """Due requests in the order they were accepted in, each with this attempt counted; nobody else gets them until then."""
    tx.value(_LOCK)  # two nodes that start together must not both take them
    found = [
        CheckpointRequest(
            principal=row[2],
            body=bytes(row[3]),
            session_id=row[4],
            key=row[5],
            priority=row[6],
            merge=bool(row[7]),
            must_exist=bool(row[8]),
            accepted_at=row[9],
            attempts=row[10] + 1,
            ref=(row[0], row[1]),
        )
        for row in tx.rows(_REQUESTS, due=due, limit=limit)
    ]
    put_off(tx, [item.ref for item in found if item.ref is not None], held_until, attempts=1)
    return found


def put_off(tx: Transaction, refs: Iterable[RequestRef], until: int, attempts: int = 0) -> None:
    """Nobody takes them up before ``until``; ``attempts`` is added to those counted."""
    for place, position in refs:
        tx.run(_PUT_OFF, checkpoint=place, place=position, until=until, more=attempts)


def settle(tx: Transaction, refs: Sequence[RequestRef]) -> None:
    """They are done: forget them."""
    if refs:
        for place, position in refs:
            tx.run(_SETTLE, checkpoint=place, place=position)
        tx.run(_DELETE_EMPTY)


def set_aside(tx: Transaction, letters: Sequence[DeadLetter], most: int) -> int:
    """Turn requests into dead letters, and drop the oldest beyond ``most``; returns how many were dropped."""
    tx.insert(
        _SAVE_LETTERS,
        [
            (
                each.request.principal,
                each.request.session_id,
                each.request.key,
                each.request.priority,
                each.request.merge,
                each.request.must_exist,
                each.request.attempts,
                each.request.accepted_at,
                each.failed_at,
                each.code,
                each.message,
                each.request.body,
            )
            for each in letters
        ],
    )
    settle(tx, [each.request.ref for each in letters if each.request.ref is not None])
    too_many = count_letters(tx) - most
    if too_many <= 0:
        return 0
    return tx.run_in(_DELETE_LETTERS, [row[0] for row in tx.rows(_OLDEST_LETTERS, limit=too_many)])


def dead_letters(tx: Transaction, after: int, limit: int) -> list[DeadLetter]:
    """Those with a greater id than ``after``, the oldest first."""
    return [_letter(row) for row in tx.rows(_LETTERS, after=after, limit=limit)]


def count_letters(tx: Transaction) -> int:
    return int(tx.value(_COUNT_LETTERS))


def retry_letters(tx: Transaction, ids: Sequence[int], checkpoint_id: str, now: int) -> list[int]:
    """Keep them as requests that have not been tried yet; returns the ids of those that there were."""
    tx.value(_LOCK)
    found = sorted([_letter(row) for row in tx.rows_in(_LETTERS_OF, sorted(set(ids)))], key=lambda each: each.id)
    found = list({each.id: each for each in found}.values())  # a list of ids is filled up by repeating one
    if found:
        untried = [replace(each.request, attempts=0) for each in found]
        save_checkpoint(tx, checkpoint_id, RETRIED_BY, untried, now)
    return _drop(tx, [each.id for each in found])


def drop_letters(tx: Transaction, ids: Sequence[int]) -> list[int]:
    """Forget them; returns the ids of those that there were."""
    tx.value(_LOCK)
    return _drop(tx, sorted({row[0] for row in tx.rows_in(_LETTERS_OF, sorted(set(ids)))}))


def _drop(tx: Transaction, ids: list[int]) -> list[int]:
    tx.run_in(_DELETE_LETTERS, ids)
    return ids


def _letter(row: Sequence[Any]) -> DeadLetter:
    return DeadLetter(
        id=row[0],
        request=CheckpointRequest(
            principal=row[1],
            session_id=row[2],
            key=row[3],
            priority=row[4],
            merge=bool(row[5]),
            must_exist=bool(row[6]),
            attempts=row[7],
            accepted_at=row[8],
            body=bytes(row[12]),
        ),
        failed_at=row[9],
        code=row[10],
        message=row[11],
    )
