"""Snapshots of the index: which one a start uses, when a new one is written, and how many are kept.

    start ─> newest usable file ─> the tail of the log ─> ready          no usable file ─> everything from the vault
    run ──> every so many seconds or entries ─> frozen index and follower ─> file ─> older files deleted

A snapshot is derived data: whatever is wrong with one, it is told (log, ``stats``, metrics), deleted, and done without. Nothing
is ever refused because one could not be written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import anyio
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.index.restore import Progress, rebuild, replay
from kimera_stream.core.index.snapshot import (
    LogPoint,
    SnapshotAbandonedError,
    SnapshotError,
    SnapshotInfo,
    inspect_snapshot,
    save,
)
from kimera_stream.core.interfaces import LogFollower, LogReader, Threads, VaultService
from kimera_stream.infrastructure.settings import PerformanceSettings
from kimera_stream.protocol.errors import LimitExceededError, NotFoundError, UnavailableError
from kimera_stream.protocol.log import LogEntry

FOLLOWER = "follower"
_PATTERN = "index-*.snapshot"
_LOOK_EVERY = 0.5
_PAUSE = 20.0
"""Times its own duration that the writing of a snapshot is followed by none: it takes a twentieth of the disk at most."""
_RETRY = 60.0
"""Seconds before another attempt after one that failed."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class SnapshotStatistics:
    """For the ``stats`` channel.

    Attributes:
        source: What the index was filled from at the start; None before that.
        replayed: Entries of the log's tail that were replayed on a snapshot.
        rejected: Why snapshots were not used at the start; empty if nothing was wrong.
        offset: Position of the log that the newest snapshot covers; None without one.
        bytes: Its size.
        written, failed: Snapshots since the start.
        error: Why the last attempt failed; None if it did not.
    """

    source: Literal["snapshot", "vault"] | None = None
    replayed: int = 0
    rejected: str = ""
    offset: int | None = None
    bytes: int = 0
    written: int = 0
    failed: int = 0
    error: str | None = None


class SnapshotKeeper:
    """Restores the index at the start and writes its snapshots. Belongs to the event loop's thread.

    Args:
        index: What is saved and restored.
        follower: What is kept beside it, saved and restored with it.
        vault: The log and the store.
        threads: Where files are worked on.
        directory: Where the files are.
        settings: ``snapshot_interval``, ``snapshot_entries``, ``snapshots_kept``.
        model: Name of the encoder.
        registry: Where the metrics go.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        index: FlatIndex,
        follower: LogFollower,
        vault: VaultService,
        threads: Threads,
        directory: Path,
        settings: PerformanceSettings,
        *,
        model: str,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        index.on_evict = follower.forget
        self._follower = follower
        self._vault = vault
        self._threads = threads
        self._directory = directory
        self._settings = settings
        self._model = model
        self._clock = clock
        self._writing = anyio.Lock()
        self._covered = 0
        """Offset up to which a start would not have to replay: 0 without a snapshot."""
        self._not_before = 0.0
        self._due_at = float("inf")
        self._position: Callable[[], int] = lambda: 0
        self._told: Callable[[], None] = lambda: None
        self.statistics = SnapshotStatistics()
        self._outcomes = Counter(
            "kimera_index_snapshots_total", "Snapshots of the index, by outcome", ["outcome"], registry=registry
        )
        Gauge(
            "kimera_index_snapshot_offset", "Log position that the newest snapshot covers", registry=registry
        ).set_function(lambda: self.statistics.offset or 0)
        self._restored = Gauge(
            "kimera_index_restored", "1 for what the index was filled from at the start", ["source"], registry=registry
        )

    @property
    def trouble(self) -> str:
        """What is wrong with the snapshots, in words for a person; empty if nothing is."""
        stats = self.statistics
        return f"no snapshot is written: {stats.error}" if stats.error else stats.rejected

    # -- the start ---------------------------------------------------------------------------------------------------

    async def restore(self, progress: Progress) -> SnapshotStatistics:
        """Fill the index and the follower, whatever they hold.

        Raises:
            LimitExceededError: there are more geoids than the index may hold, and its policy is to refuse.
            UnavailableError: the vault cannot be read.
        """
        stats = self.statistics = SnapshotStatistics()
        self._position = lambda: self._vault.head
        files = await self._threads.run("io", _files, self._directory) if self._settings.snapshots_kept else []
        for path in files:
            self._clear()
            try:
                info = await self._take_over(path)
            except SnapshotError as error:
                await self._reject(path, error)
                continue
            stats.offset, stats.bytes, self._covered = info.point.offset, info.bytes, info.point.offset
            progress(f"{self._index.size:,} geoids of a snapshot")
            stats.replayed = await replay(self._index, self._follower, self._vault, info.point.offset, progress)
            stats.source = "snapshot"
            break
        else:
            self._clear()
            self._covered = 0
            await rebuild(self._index, self._follower, self._vault, progress)
            stats.source = "vault"
        await self._index.prepare()
        self._restored.labels(stats.source).set(1)
        self._schedule()
        log.info("index filled", source=stats.source, geoids=self._index.size, replayed=stats.replayed)
        return stats

    def _clear(self) -> None:
        self._index.clear()
        self._follower.clear()

    async def _take_over(self, path: Path) -> SnapshotInfo:
        info = await self._threads.run("io", self._inspect, path)
        await self._check_point(path.name, info.point)
        try:
            info, extras = await self._index.load(path, model=self._model, epoch=self._vault.epoch)
        except LimitExceededError as error:
            raise SnapshotError("foreign", f"{path.name}: {error.message}") from error
        try:
            self._follower.thaw(extras[FOLLOWER])
        except (KeyError, ValueError) as error:
            raise SnapshotError("foreign", f"{path.name}: without what belongs beside the index") from error
        return info

    def _inspect(self, path: Path) -> SnapshotInfo:
        return inspect_snapshot(path, dimension=self._index.dimension, model=self._model, epoch=self._vault.epoch)

    async def _check_point(self, name: str, point: LogPoint) -> None:
        """Whether the log goes on from where the snapshot ends.

        Raises:
            SnapshotError: it does not.
        """
        if point.offset > self._vault.head:
            raise SnapshotError(
                "ahead", f"{name}: covers the log up to {point.offset}, which ends at {self._vault.head}"
            )
        try:
            found = await point_at(self._vault, point.offset)
        except NotFoundError as error:
            raise SnapshotError("behind", f"{name}: {error.message}") from error
        if found != point:
            raise SnapshotError("diverged", f"{name}: the log holds another entry {point.offset} than it ends with")

    async def _reject(self, path: Path, error: SnapshotError) -> None:
        log.warning("index snapshot not used", file=path.name, reason=error.reason, detail=str(error))
        self._outcomes.labels("rejected").inc()
        told = self.statistics.rejected
        self.statistics.rejected = f"{told}; {error}" if told else f"{error.reason}: {error}"
        await self._threads.run("io", _delete, [path])

    # -- writing -----------------------------------------------------------------------------------------------------

    def on_change(self, told: Callable[[], None]) -> None:
        """Call ``told`` now and whenever ``trouble`` may be another."""
        self._told = told
        told()

    def follow(self, position: Callable[[], int]) -> None:
        """Ask ``position`` from now on how far into the log the index reaches; until then it is the log's end."""
        self._position = position

    async def run(self) -> None:
        """Write a snapshot whenever one is due, until cancelled."""
        if not self._settings.snapshots_kept:
            await anyio.sleep_forever()
        while True:
            await anyio.sleep(_LOOK_EVERY)
            if self._is_due():
                await self.save()

    def _is_due(self) -> bool:
        changed, now = self._position() - self._covered, self._clock()
        if changed <= 0 or now < self._not_before:
            return False
        return (
            bool(self._settings.snapshot_entries and changed >= self._settings.snapshot_entries) or now >= self._due_at
        )

    def _schedule(self) -> None:
        interval = self._settings.snapshot_interval
        self._due_at = self._clock() + interval if interval else float("inf")

    async def finish(self, seconds: float) -> None:
        """Write a last snapshot if anything has changed since the one before, within ``seconds``."""
        if not self._settings.snapshots_kept or self.statistics.source is None:
            return
        with anyio.move_on_after(seconds):
            if self._position() > self._covered:
                await self.save()

    async def save(self) -> bool:
        """Write a snapshot; whether it was. Cancelled, it gives up soon. What goes wrong is told, not raised."""
        stop = anyio.Event()
        going = [True]

        async def give_up_when_cancelled() -> None:
            try:
                await stop.wait()
            finally:
                going[0] = False

        written = False
        async with anyio.create_task_group() as group:
            group.start_soon(give_up_when_cancelled, name="index:snapshot-watch")
            async with self._writing:
                written = await self._save(lambda: going[0])
            stop.set()
        return written

    async def _save(self, keep_going: Callable[[], bool]) -> bool:
        stats, began = self.statistics, self._clock()
        try:
            with self._index.frozen() as state:
                extras, offset = {FOLLOWER: self._follower.freeze()}, self._position()
                info = await save(
                    self._directory / f"index-{offset:020d}.snapshot",
                    state,
                    threads=self._threads,
                    dimension=self._index.dimension,
                    model=self._model,
                    point=await point_at(self._vault, offset),
                    extras=extras,
                    keep_going=keep_going,
                )
        except SnapshotAbandonedError:
            log.warning("index snapshot given up: the server stops", covered=self._covered)
            return False
        except (UnavailableError, NotFoundError) as error:
            stats.failed += 1
            stats.error = error.message
            self._outcomes.labels("failed").inc()
            self._not_before = self._clock() + min(_RETRY, self._settings.snapshot_interval or _RETRY)
            log.warning("index snapshot not written", reason=error.message, covered=self._covered)
            self._told()
            return False
        seconds = self._clock() - began
        self._covered = stats.offset = info.point.offset
        stats.bytes, stats.error = info.bytes, None
        stats.written += 1
        self._outcomes.labels("written").inc()
        self._told()
        self._not_before = self._clock() + _PAUSE * seconds
        self._schedule()
        await self._threads.run("io", _keep_newest, self._directory, self._settings.snapshots_kept)
        log.info(
            "index snapshot written", geoids=info.geoids, offset=offset, bytes=info.bytes, seconds=round(seconds, 3)
        )
        return True


async def point_at(log_reader: LogReader, offset: int) -> LogPoint:
    """An entry of the log as a snapshot names it.

    Raises:
        NotFoundError: the log does not hold it any more.
        UnavailableError: the log cannot be read.
    """
    if offset == 0:
        return LogPoint(log_reader.epoch, 0)
    page = await log_reader.read(None, after=offset - 1, limit=1, until=offset)
    if not page.entries:
        raise NotFoundError(f"the log no longer holds the entry {offset}")
    return LogPoint(log_reader.epoch, offset, _digest(page.entries[0]))


def _digest(entry: LogEntry) -> str:
    told = f"{entry.offset}\x1f{entry.type}\x1f{entry.ts}\x1f{' '.join(entry.channels)}\x1f".encode()
    return blake2b(told + bytes(entry.data), digest_size=16).hexdigest()


def _files(directory: Path) -> list[Path]:
    """Snapshots, the newest first. What a killed process left half-written is deleted."""
    _delete(list(directory.glob(_PATTERN + ".partial")))
    return sorted(directory.glob(_PATTERN), reverse=True)


def _keep_newest(directory: Path, kept: int) -> None:
    _delete(sorted(directory.glob(_PATTERN), reverse=True)[kept:])


def _delete(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a file could not be deleted", file=path.name, error=error.strerror)
