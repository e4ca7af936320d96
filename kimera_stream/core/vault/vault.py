"""The vault on a SQL database."""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Final

import anyio
import structlog
from sqlalchemy import bindparam, update

from kimera_stream.core.columns import GeoidColumns, SlicedColumns
from kimera_stream.core.coverage import LockedLog
from kimera_stream.core.groups import Within
from kimera_stream.core.interfaces import (
    MOST_WATCHES,
    MOST_WATCHES_PER_PRINCIPAL,
    FramePage,
    IdempotencyRecord,
    LogPage,
    OutcomeUnknownError,
    Page,
    StoredGeoid,
    Vector,
    WriteBatch,
)
from kimera_stream.core.kept import (
    CheckpointRequest,
    DeadLetter,
    RequestRef,
    Revocation,
    RevocationKind,
    UsageRecord,
)
from kimera_stream.core.vault import reading, records, requests, schema, trimming, writing
from kimera_stream.core.vault.columns import columns_after, slices_after
from kimera_stream.core.vault.entries import LogState, read_frames, read_page, read_state
from kimera_stream.core.vault.locked import SqlLockedLog
from kimera_stream.core.vault.migrate import migrate
from kimera_stream.infrastructure.database import (
    ABANDONED_AFTER,
    CommitInDoubtError,
    CommitWatch,
    Database,
    Query,
    Transaction,
)
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.errors import ConflictError, LimitExceededError, UnavailableError
from kimera_stream.protocol.objects import Contradiction, ContradictionState, Geoid, Scar, Watch

log = structlog.get_logger(__name__)

MOST_REVOCATIONS: Final = 100_000

_SET_ENCODER = Query(update(schema.log_state).where(schema.log_state.c.id == 1).values(encoder=bindparam("name")))


def unix_ms() -> int:
    """The time of day."""
    return time.time_ns() // 1_000_000


class SqlVault:
    """``VaultService`` on SQLite or PostgreSQL.

    Reads may come from any number of tasks; writes are taken one at a time. Every method may raise UnavailableError, and
    works again by itself once the database does.

    Args:
        url: ``sqlite+aiosqlite:///FILE`` or ``postgresql+asyncpg://USER@HOST/NAME``.
        settings: The database group.
        clock: Unix ms.
        abandoned_after: Seconds after which PostgreSQL ends the transaction of a process that has stopped in the middle:
            until then nobody else can write. Where other nodes write as well it has to be short.

    Raises:
        BadRequestError: the URL is of no database that is supported.
    """

    def __init__(
        self,
        url: str,
        settings: DatabaseSettings,
        *,
        clock: Callable[[], int] = unix_ms,
        abandoned_after: float = ABANDONED_AFTER,
    ) -> None:
        self._url = url
        self._settings = settings
        self._clock = clock
        self._database = Database(url, settings, abandoned_after=abandoned_after)
        self._state: LogState | None = None
        self._head = 0
        self._trimmed = 0
        self._in_doubt = False

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the schema up to date and read where the log ends.

        Raises:
            VaultSchemaError: the database was made by a newer version; the message names the next step.
            UnavailableError: it cannot be reached, opened or written.
        """
        await migrate(self._url, settings=self._settings)
        await self.refresh()

    async def close(self) -> None:
        """Close all connections, within a deadline. A commit under way is waited for."""
        await self._database.close()

    async def ping(self) -> None:
        """Raises UnavailableError if a trivial read does not come back, or nothing can be written as a commit lasts too long."""
        await self._database.ping()
        if trouble := self.commits.trouble:
            raise UnavailableError(trouble)

    @property
    def commits(self) -> CommitWatch:
        """How long the write under way has lasted; ``admit`` refuses new ones while that is too long."""
        return self._database.commits

    async def refresh(self) -> int:
        """Read the ends of the log again, which other nodes may have moved; returns the head."""
        self._learn(await self._database.read(read_state))
        return self._head

    def _learn(self, state: LogState) -> None:
        self._state = state
        self._head = max(self._head, state.head)
        self._trimmed = max(self._trimmed, state.trimmed)

    # -- the log -----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> str:
        """Identity of this log.

        Raises:
            UnavailableError: the vault has not been started.
        """
        if self._state is None:
            raise UnavailableError("the vault has not been started")
        return self._state.epoch

    @property
    def head(self) -> int:
        """Offset of the newest committed entry that this node has heard of; 0 in an empty log."""
        return self._head

    @property
    def trimmed(self) -> int:
        """Entries at or below are gone. Looked at after a ``read``, it says whether that page may lack something."""
        return self._trimmed

    @property
    def encoder(self) -> str | None:
        """Name of the model that made the stored vectors, as recorded by ``record_encoder``."""
        return None if self._state is None else self._state.encoder

    async def record_encoder(self, name: str) -> None:
        """Record which model makes the stored vectors: those of another one must be made anew."""
        await self._database.write(lambda tx: tx.run(_SET_ENCODER, name=name))
        await self.refresh()

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        """A page of the log; see ``LogReader.read``.

        A page ends early, with ``more`` set, when it holds about 8 MiB. Going on: ``after=page.scanned``, in reverse
        ``until=page.scanned - 1``. ``until`` ahead of the head reads what other nodes have committed up to it.

        Raises:
            DamagedLogError: an entry is not what was committed, or missing.
        """
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        head = self._head
        bound = head if until is None else until

        def page(tx: Transaction) -> tuple[LogState, LogPage]:
            state = read_state(tx)
            upto = min(bound, max(head, state.head))
            return state, read_page(
                tx, channel, after=after, until=upto, limit=limit, reverse=reverse, trimmed=state.trimmed
            )

        state, found = await self._database.read(page)
        self._trimmed = max(self._trimmed, state.trimmed)
        return found

    async def read_frames(self, channel: str, *, head: bytes, after: int, limit: int, until: int) -> FramePage:
        """A page of a channel as frames; see ``FrameReader.read_frames``. About 3 microseconds an entry less than ``read``.

        Raises:
            DamagedLogError: an entry is not what was committed, or missing.
        """
        head_of_log = self._head

        def page(tx: Transaction) -> tuple[LogState, FramePage]:
            state = read_state(tx)
            upto = min(until, max(head_of_log, state.head))
            return state, read_frames(
                tx, channel, head=head, after=after, until=upto, limit=limit, trimmed=state.trimmed
            )

        state, found = await self._database.read(page)
        self._trimmed = max(self._trimmed, state.trimmed)
        return found

    async def commit(self, batch: WriteBatch) -> None:
        """Commit atomically and durably; see ``VaultService.commit``. A cancelled caller waits until it is decided.

        Raises:
            ConflictError: the first entry is not ``head + 1``; the head has been read again.
            UnavailableError: nothing was written.
            OutcomeUnknownError: whether it was written could not be learned.
            ValueError: the entries are not consecutive.
        """
        writing.check_batch(batch)
        with anyio.CancelScope(shield=True):
            try:
                head = await self._database.write(
                    partial(writing.write_batch, batch=batch, now=self._clock()), accepted=True
                )
            except CommitInDoubtError:
                head = await self._settle(batch)
            except ConflictError:
                await self.refresh()
                raise
            self._head = max(self._head, head)

    async def transact(self, plan: Callable[[LockedLog], WriteBatch]) -> WriteBatch:
        """Plan under the log's lock and commit what comes of it; see ``ClusterVault.transact``."""
        planned = WriteBatch()

        def run(tx: Transaction) -> int:
            nonlocal planned
            planned = plan(SqlLockedLog(tx))
            writing.check_batch(planned)
            return writing.write_batch(tx, planned, self._clock()) if planned.entries or planned.idempotency else 0

        with anyio.CancelScope(shield=True):
            try:
                head = await self._database.write(run, accepted=True)
            except CommitInDoubtError:
                head = await self._settle(planned)
            self._head = max(self._head, head)
        return planned

    async def _settle(self, batch: WriteBatch) -> int:
        """Learn whether a commit happened whose answer was lost."""
        if not batch.entries:
            raise OutcomeUnknownError(
                "the connection was lost during a commit; its outcome is not known", retry_after=1.0
            )
        with anyio.move_on_after(self._settings.busy_timeout):
            while True:
                try:
                    written = await self._database.write(partial(writing.is_written, batch=batch), accepted=True)
                except UnavailableError:
                    await anyio.sleep(0.1)
                    continue
                log.warning("commit settled after a lost connection", written=written, offset=batch.entries[-1].offset)
                if written:
                    return batch.entries[-1].offset
                raise UnavailableError("the connection to the database was lost: nothing was written", retry_after=1.0)
        raise OutcomeUnknownError(
            "the connection to the database was lost during a commit and has not come back: "
            "the outcome is not known; repeat the request with its idempotency key",
            retry_after=self._settings.busy_timeout,
        )

    async def trim(self, upto: int) -> int:
        """Drop log entries at or below ``upto``, in bounded steps; returns how many. Entities stay."""
        dropped = 0
        upto = min(upto, self._head)
        while self._trimmed < upto:
            count, trimmed = await self._database.write(partial(trimming.trim_step, upto=upto, now=self._clock()))
            self._trimmed = max(self._trimmed, trimmed)
            dropped += count
            if count == 0:
                break
        return dropped

    async def retained(self) -> LogState:
        """The ends and the size of the log, as the database has them now."""
        state = await self._database.read(read_state)
        self._learn(state)
        return state

    async def offset_before(self, ts: int) -> int:
        """The last kept offset whose entry is older than ``ts`` (unix ms), or ``trimmed``."""
        return await self._database.read(partial(trimming.offset_before, ts=ts))

    async def offset_to_free(self, excess: int) -> int:
        """The offset up to which about ``excess`` bytes of payload, or one step's worth, would be trimmed."""
        return await self._database.read(partial(trimming.offset_to_free, excess=excess))

    # -- geoids ------------------------------------------------------------------------------------------------------

    async def geoid(self, geoid_id: str) -> StoredGeoid | None:
        return (await self.geoids([geoid_id])).get(geoid_id)

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]:
        """Those of ``ids`` that exist."""
        if not ids:
            return {}
        return await self._database.read(partial(reading.stored_geoids, ids=list(ids)))

    async def saying(self, texts: Sequence[str], *, limit: int) -> dict[str, list[str]]:
        """By text, ids of the newest geoids that say exactly that, ``limit`` of each at most."""
        return await self._database.read(partial(reading.saying, texts=list(texts), limit=limit))

    async def list_geoids(
        self, *, after: int, limit: int, session_id: str | None = None, agent_id: str | None = None
    ) -> Page[Geoid]:
        return await self._database.read(
            partial(reading.geoid_page, after=after, limit=limit, session_id=session_id, agent_id=agent_id)
        )

    async def scan_columns(self, *, batch: int, dimension: int) -> AsyncIterator[GeoidColumns]:
        """Every live geoid in offset order. One that is updated meanwhile comes again, in its newer version.

        Raises:
            DamagedVaultError: a vector is not of ``dimension`` numbers.
        """
        after = 0
        while True:
            found, after = await self._database.read(
                partial(columns_after, after=after, limit=batch, dimension=dimension)
            )
            if len(found):
                yield found
            if len(found) < batch:
                return

    async def scan_slices(
        self, numbers: Sequence[int], *, slices: int, batch: int, dimension: int, within: Within
    ) -> AsyncIterator[SlicedColumns]:
        """Every live geoid of some slices in offset order. One that is updated meanwhile comes again, in its newer version.

        Args:
            numbers: Which slices.
            slices: How many there are.
            batch: Geoids looked at in one read; of these, those of the slices are loaded.
            dimension: Of the vectors.
            within: What groups are wanted.

        Raises:
            DamagedVaultError: a vector is not of ``dimension`` numbers.
        """
        after, looked_at = 0, batch
        chosen = partial(
            slices_after, limit=batch, dimension=dimension, numbers=frozenset(numbers), slices=slices, within=within
        )
        while looked_at == batch:
            found, after, looked_at = await self._database.read(partial(chosen, after=after))
            if len(found):
                yield found

    async def scan_groups(self, within: Within, *, batch: int = 5_000) -> AsyncIterator[list[tuple[str, str | None]]]:
        """Id and group of every live geoid."""
        after = 0
        while True:
            found, after = await self._database.read(
                partial(reading.groups_after, within=within, after=after, limit=batch)
            )
            if found:
                yield found
            if len(found) < batch:
                return

    async def count_geoids(self) -> int:
        return await self._database.read(reading.count_geoids)

    # -- contradictions and scars ----------------------------------------------------------------------------------------

    async def contradiction(self, contradiction_id: str) -> Contradiction | None:
        return await self._database.read(partial(reading.one_contradiction, contradiction_id=contradiction_id))

    async def list_contradictions(
        self,
        *,
        after: int,
        limit: int,
        state: ContradictionState | None = None,
        min_score: float | None = None,
        geoid_id: str | None = None,
    ) -> Page[Contradiction]:
        return await self._database.read(
            partial(
                reading.contradiction_page,
                after=after,
                limit=limit,
                state=state,
                min_score=None if min_score is None else float(min_score),
                geoid_id=geoid_id,
            )
        )

    async def contradictions_of(self, geoid_ids: Sequence[str], *, state: ContradictionState) -> list[Contradiction]:
        """Contradictions in ``state`` in which any of the geoids takes part, in offset order."""
        if not geoid_ids:
            return []
        return await self._database.read(partial(reading.contradictions_of, geoid_ids=list(geoid_ids), state=state))

    async def count_contradictions(self, state: ContradictionState) -> int:
        return await self._database.read(partial(reading.count_contradictions, state=state))

    async def list_scars(self, *, after: int, limit: int) -> Page[Scar]:
        return await self._database.read(partial(reading.scar_page, after=after, limit=limit))

    async def scar_weights(self) -> tuple[float, float]:
        """Summed weight of vault a and of vault b."""
        return await self._database.read(reading.scar_weights)

    # -- what readers and requests leave -----------------------------------------------------------------------------------

    async def idempotent(self, principal: str, key: str, *, not_before: int) -> IdempotencyRecord | None:
        """The record of a keyed publish made at or after ``not_before`` (unix ms)."""
        return await self._database.read(
            partial(records.find_key, principal=principal, name=key, not_before=not_before)
        )

    async def purge_idempotency(self, before: int, *, limit: int = 1_000) -> int:
        """Drop about ``limit`` keys made before ``before`` (unix ms); returns how many were dropped."""
        return await self._database.write(partial(records.purge_keys, before=before, limit=limit))

    async def save_watch(
        self,
        watch: Watch,
        vector: Vector | None,
        *,
        most: int = MOST_WATCHES,
        most_per_principal: int = MOST_WATCHES_PER_PRINCIPAL,
    ) -> Watch:
        """See ``VaultService.save_watch``."""
        kept = await self._database.write(
            partial(records.save_watch, saved=watch, vector=vector, most=most, most_per_principal=most_per_principal)
        )
        if kept is None:
            raise LimitExceededError(
                f"watch: at most {most_per_principal} per principal, and {most} in all", field="watch"
            )
        return kept

    async def delete_watch(self, principal: str, name: str) -> bool:
        return await self._database.write(partial(records.delete_watch, principal=principal, name=name))

    async def watches(self) -> list[tuple[Watch, Vector | None]]:
        return await self._database.read(records.all_watches)

    async def save_cursor(self, principal: str, name: str, channel: str, offset: int) -> None:
        """Insert or move it.

        Raises:
            LimitExceededError: the principal has ``max_cursors`` others already.
        """
        most = self._settings.max_cursors
        saved = await self._database.write(
            partial(
                records.save_cursor,
                principal=principal,
                name=name,
                channel=channel,
                epoch=self.epoch,
                offset=offset,
                now=self._clock(),
                most=most,
            )
        )
        if not saved:
            raise LimitExceededError(f"name: a principal keeps at most {most} durable cursors", field="name")

    async def cursor(self, principal: str, name: str, channel: str) -> int | None:
        """The saved offset; None if there is none in this epoch."""
        return await self._database.read(
            partial(records.find_cursor, principal=principal, name=name, channel=channel, epoch=self.epoch)
        )

    async def save_checkpoint(self, items: Sequence[CheckpointRequest], *, node: str = "") -> None:
        """Keep accepted and unprocessed requests over a restart, in their order."""
        if items:
            await self._database.write(
                partial(
                    requests.save_checkpoint,
                    checkpoint_id=secrets.token_urlsafe(12),
                    node=node,
                    requests=list(items),
                    now=self._clock(),
                ),
                accepted=True,
            )

    async def take_up(self, *, due: int, held_until: int, limit: int) -> list[CheckpointRequest]:
        """Kept requests whose time has come, with an attempt counted; see ``VaultService.take_up``."""
        if await self._database.read(partial(requests.count_due, due=due)) == 0:
            return []
        return await self._database.write(
            partial(requests.take_up, due=due, held_until=held_until, limit=limit), accepted=True
        )

    async def release(self) -> None:
        """All kept requests may be taken up at once: whoever held them is gone."""
        if await self._database.read(requests.count_held):
            await self._database.write(requests.release, accepted=True)

    async def put_off(self, refs: Sequence[RequestRef], *, until: int, attempts: int = 0) -> None:
        """Kept requests are taken up no sooner than ``until`` (unix ms)."""
        if refs:
            await self._database.write(
                partial(requests.put_off, refs=list(refs), until=until, attempts=attempts), accepted=True
            )

    async def settle(self, refs: Sequence[RequestRef]) -> None:
        """Forget kept requests that are done."""
        if refs:
            await self._database.write(partial(requests.settle, refs=list(refs)), accepted=True)

    async def set_aside(self, letters: Sequence[DeadLetter], *, most: int) -> int:
        """Make dead letters; returns how many of the oldest were dropped."""
        return await self._database.write(partial(requests.set_aside, letters=list(letters), most=most), accepted=True)

    async def count_dead_letters(self) -> int:
        return await self._database.read(requests.count_letters)

    async def session(self, session_id: str) -> records.SessionRecord | None:
        """A session that has published; kept by ``commit``."""
        return await self._database.read(partial(records.find_session, session_id=session_id))

    async def recent_sessions(self, *, since: int, limit: int) -> list[records.SessionRecord]:
        """Sessions that published at or after ``since`` (unix ms), the latest first."""
        return await self._database.read(partial(records.recent_sessions, since=since, limit=limit))

    async def purge_sessions(self, before: int, *, limit: int = 1_000) -> int:
        """Drop sessions quiet since before ``before`` (unix ms), ``limit`` at most; their geoids stay."""
        return await self._database.write(partial(records.purge_sessions, before=before, limit=limit))

    async def last_said(self, sessions: Sequence[str], *, limit: int) -> dict[str, list[tuple[str, str | None, int]]]:
        """By session, its newest statements (geoid id, agent id, unix ms), the newest first."""
        return await self._database.read(partial(records.last_said, sessions=list(sessions), limit=limit))

    async def usage(self, *, since_day: int = 0, principal: str | None = None, limit: int = 2**31) -> list[UsageRecord]:
        """What each principal, or one of them, published per day."""
        return await self._database.read(partial(records.usage_since, day=since_day, principal=principal, limit=limit))

    async def audit(self, *, since: int = 0, limit: int = 1_000) -> list[tuple[int, str, str, str]]:
        """Audit entries (unix ms, principal, action, target), oldest first."""
        return await self._database.read(partial(records.audit_since, since=since, limit=limit))

    async def audit_upto(self, *, keep: int = 0, before: int = 0) -> int:
        """The id up to which audit entries are beyond the newest ``keep``, or were made before ``before`` (unix ms)."""
        return await self._database.read(partial(records.audit_upto, keep=keep, before=before))

    async def purge_audit(self, upto: int, *, limit: int = 1_000) -> int:
        """Drop at most ``limit`` of the audit entries up to an id, the oldest; returns how many were dropped."""
        return await self._database.write(partial(records.purge_audit, upto=upto, limit=limit))

    async def revoke(self, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        """See ``RevocationStore.revoke``."""
        made = await self._database.write(
            partial(
                records.revoke,
                kind=kind,
                subject=subject,
                by=by,
                expires_at=expires_at,
                now=self._clock(),
                most=MOST_REVOCATIONS,
            )
        )
        if made is None:
            raise LimitExceededError(
                f"at most {MOST_REVOCATIONS} revocations are kept: revoke whole principals instead"
            )
        return made

    async def revocations(self, *, after: int, limit: int) -> list[Revocation]:
        """See ``RevocationStore.revocations``."""
        return await self._database.read(partial(records.revocations_after, after=after, limit=limit))
