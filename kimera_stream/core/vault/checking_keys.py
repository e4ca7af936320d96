"""Are the first results of keyed requests what was committed? Each is read with its checksum, a page at a time."""

from collections.abc import Callable
from functools import partial

from sqlalchemy import Text, bindparam, func, select, tuple_

from kimera_stream.core.vault import rows, schema
from kimera_stream.core.vault.errors import DamagedVaultError
from kimera_stream.infrastructure.database import Database, Query, Transaction

_STEP = 1_000

key = schema.idempotency_key
_COUNT = Query(select(func.count()).select_from(key))
_PAGE = Query(
    select(*rows.RECORD_COLUMNS)
    .where(
        tuple_(key.c.principal, key.c.key)
        > tuple_(bindparam("after_principal", type_=Text()), bindparam("after_key", type_=Text()))
    )
    .order_by(key.c.principal, key.c.key)
    .limit(bindparam("limit"))
)


async def check_keys(database: Database, problem: Callable[[str], None], progress: Callable[[int, int], None]) -> int:
    """Verify every first result; returns how many had a checksum. One that an earlier version wrote has none.

    Args:
        problem: Told of each that is damaged.
        progress: Called with (looked at, in all).

    Raises:
        UnavailableError: the rest cannot be read.
    """
    total = int(await database.read(lambda tx: tx.value(_COUNT)))
    progress(0, total)
    looked_at, verified, after = 0, 0, ("", "")
    while True:
        page = await database.read(partial(_page, after=after, limit=_STEP))
        for row in page:
            verified += row[4] is not None
            try:
                rows.record_of(row)
            except DamagedVaultError:
                problem(f"the first result of key {row[1]!r} of {row[0]!r} does not match its checksum")
        looked_at += len(page)
        progress(looked_at, max(total, looked_at))
        if len(page) < _STEP:
            return verified
        after = page[-1][0], page[-1][1]


def _page(tx: Transaction, after: tuple[str, str], limit: int) -> list[rows.Row]:
    return list(tx.rows(_PAGE, after_principal=after[0], after_key=after[1], limit=limit))
