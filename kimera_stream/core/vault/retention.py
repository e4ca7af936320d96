"""What is kept for how long."""

from collections.abc import Callable

import structlog

from kimera_stream.core.vault.vault import SqlVault, unix_ms
from kimera_stream.infrastructure.settings import DatabaseSettings

log = structlog.get_logger(__name__)

_PER_STEP = 1_000
"""Rows dropped in one transaction, about."""


class Retention:
    """Drops what the settings do not ask to keep. Geoids and what was found among them are never dropped, only log entries, expired
    keys, the records of sessions that have long been quiet, and the oldest of the audit trail.

    Args:
        vault: Where.
        settings: ``retention_age``, ``retention_count`` and ``retention_bytes``; the strictest of them counts; ``retention_sessions``;
            ``retention_audit_count`` and ``retention_audit_age``, of which the stricter counts.
        idempotency_window: Seconds for which keys of publishes are kept.
        clock: Unix ms.
    """

    def __init__(
        self,
        vault: SqlVault,
        settings: DatabaseSettings,
        *,
        idempotency_window: float = 300.0,
        clock: Callable[[], int] = unix_ms,
    ) -> None:
        self._vault = vault
        self._settings = settings
        self._window_ms = int(idempotency_window * 1000)
        self._clock = clock

    async def run_once(self) -> int:
        """Apply all of it now, in steps between which other writes go on; returns how many entries were dropped.

        Raises:
            UnavailableError: the database refuses; what was dropped before that stays dropped.
        """
        dropped = await self._by_count_and_age() + await self._by_bytes()
        while await self._vault.purge_idempotency(self._clock() - self._window_ms, limit=_PER_STEP):
            pass
        await self._quiet_sessions()
        await self._audit()
        if dropped:
            log.info("log trimmed", dropped=dropped, trimmed=self._vault.trimmed)
        return dropped

    async def _quiet_sessions(self) -> None:
        if self._settings.retention_sessions:
            before = self._clock() - int(self._settings.retention_sessions * 1000)
            while await self._vault.purge_sessions(before, limit=_PER_STEP):
                pass

    async def _audit(self) -> None:
        age = self._settings.retention_audit_age
        before = self._clock() - int(age * 1000) if age else 0
        upto = await self._vault.audit_upto(keep=self._settings.retention_audit_count, before=before)
        while upto and await self._vault.purge_audit(upto, limit=_PER_STEP):
            pass

    async def _by_count_and_age(self) -> int:
        upto = 0
        if self._settings.retention_count:
            upto = (await self._vault.retained()).head - self._settings.retention_count
        if self._settings.retention_age:
            oldest = self._clock() - int(self._settings.retention_age * 1000)
            upto = max(upto, await self._vault.offset_before(oldest))
        return await self._vault.trim(upto) if upto > 0 else 0

    async def _by_bytes(self) -> int:
        if not self._settings.retention_bytes:
            return 0
        dropped = 0
        while (excess := (await self._vault.retained()).payload_bytes - self._settings.retention_bytes) > 0:
            step = await self._vault.trim(await self._vault.offset_to_free(excess))
            if step == 0:
                break
            dropped += step
        return dropped
