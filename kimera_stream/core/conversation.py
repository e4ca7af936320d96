"""What was said lately in each session: a bounded memory of geoid ids, beside the log and never instead of it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

UTTERANCE_BYTES = 320
"""Of a statement besides the characters of its ids (measured)."""
SESSION_BYTES = 700
"""Of a session without statements."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One statement of a conversation. ``at``: seconds of the memory's clock."""

    geoid_id: str
    agent_id: str | None
    at: float


@dataclass(frozen=True, slots=True)
class ConversationStatistics:
    """Counts. ``sessions`` and ``utterances`` are of now, the others since the start.

    ``evicted`` sessions made room for others, ``expired`` ones were quiet for too long, ``dropped`` utterances made room in
    their own session.
    """

    sessions: int
    utterances: int
    bytes: int
    remembered: int
    dropped: int
    evicted: int
    expired: int


class ConversationMemory:
    """The newest statements of the most recently used sessions.

    Bounded four ways: at most ``sessions`` sessions, and ``max_bytes`` bytes of them all (the least recently used goes
    first), at most ``history`` statements in each (the oldest goes first), and nothing of a session that was not used for
    ``ttl`` seconds. Both saying something
    in a session and asking for its history use it. Every operation takes amortised constant time but for the size of the
    history it returns. For the event loop's thread alone.

    Args:
        sessions: Sessions at most, >= 1.
        history: Statements per session at most, >= 1.
        ttl: Seconds, > 0.
        max_bytes: Bytes of all of them at most, by estimate; one statement is kept in any case.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        sessions: int,
        history: int,
        ttl: float,
        max_bytes: int = 1 << 26,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if sessions < 1 or history < 1 or not ttl > 0:
            raise ValueError(f"expected sessions >= 1, history >= 1, ttl > 0; got {sessions}, {history}, {ttl}")
        self._max_sessions = sessions
        self._max_history = history
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._bytes = 0
        self._clock = clock
        # In order of use, the least recent first.
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._utterances = self._remembered = self._dropped = self._evicted = self._expired = 0

    def remember(self, session_id: str, geoid_id: str, *, agent_id: str | None = None) -> None:
        """A statement was made, or made anew, in a session: it becomes the newest there."""
        now = self._expire()
        session = self._sessions.get(session_id)
        if session is None:
            if len(self._sessions) == self._max_sessions:
                self._evict()
            session = self._sessions[session_id] = _Session(now, OrderedDict())
            self._bytes += SESSION_BYTES + len(session_id)
        self._use(session_id, session, now)
        if not self._take_out(session, geoid_id) and len(session.utterances) == self._max_history:
            self._drop(session)
        said = session.utterances[geoid_id] = Utterance(geoid_id, agent_id, now)
        self._utterances += 1
        self._bytes += _bytes_of(said)
        self._remembered += 1
        while self._bytes > self._max_bytes and (len(self._sessions) > 1 or len(session.utterances) > 1):
            if len(self._sessions) > 1:
                self._evict()
            else:
                self._drop(session)

    def restore(self, session_id: str, said: Sequence[tuple[str, str | None, float]]) -> bool:
        """Put back what was said in a session before the start, as the least recently used of all; what is remembered already
        comes after it. Restore the most recent session first: none is evicted for an older one.

        Args:
            said: Geoid id, agent id and seconds since, the oldest first.

        Returns:
            False where the memory is full of more recent sessions.
        """
        now = self._expire()
        session = self._sessions.get(session_id)
        known = OrderedDict() if session is None else session.utterances
        before = [
            Utterance(geoid, agent, now - age) for geoid, agent, age in said if geoid not in known and age < self._ttl
        ]
        before = before[max(0, len(before) + len(known) - self._max_history) :]
        size = sum(map(_bytes_of, before)) + (SESSION_BYTES + len(session_id) if session is None else 0)
        if self._bytes + size > self._max_bytes or (session is None and len(self._sessions) == self._max_sessions):
            return False
        if not before:
            return True
        if session is None:
            session = self._sessions[session_id] = _Session(before[-1].at, known)
            self._sessions.move_to_end(session_id, last=False)
        self._bytes += size
        session.utterances = OrderedDict((each.geoid_id, each) for each in before)
        session.utterances.update(known)
        self._utterances += len(before)
        return True

    def history(self, session_id: str, limit: int | None = None) -> list[Utterance]:
        """The newest ``limit`` statements of a session (None: all that are kept), the oldest of them first.

        Empty for a session that is not known, which does not become known by asking.
        """
        now = self._expire()
        session = self._sessions.get(session_id)
        if session is None:
            return []
        self._use(session_id, session, now)
        kept = list(session.utterances.values())
        return kept if limit is None else kept[max(0, len(kept) - limit) :]

    def forget(self, session_id: str, geoid_id: str | None = None) -> bool:
        """Forget one statement of a session (it was deleted), or the session as a whole. Whether there was such a thing."""
        self._expire()
        session = self._sessions.get(session_id)
        if session is None:
            return False
        if geoid_id is None:
            self._remove(session_id)
            return True
        return self._take_out(session, geoid_id)

    def __contains__(self, session_id: object) -> bool:
        self._expire()
        return session_id in self._sessions

    def statistics(self) -> ConversationStatistics:
        """What is held at this moment, and what went."""
        self._expire()
        return ConversationStatistics(
            sessions=len(self._sessions),
            utterances=self._utterances,
            bytes=self._bytes,
            remembered=self._remembered,
            dropped=self._dropped,
            evicted=self._evicted,
            expired=self._expired,
        )

    def _use(self, session_id: str, session: "_Session", now: float) -> None:
        session.used = now
        self._sessions.move_to_end(session_id)

    def _expire(self) -> float:
        """Drop the sessions that were quiet for too long: being in order of use, they are all at the front."""
        now = self._clock()
        while self._sessions:
            session_id, session = next(iter(self._sessions.items()))
            if now - session.used < self._ttl:
                break
            self._remove(session_id)
            self._expired += 1
        return now

    def _evict(self) -> None:
        """The least recently used session goes."""
        self._remove(next(iter(self._sessions)))
        self._evicted += 1

    def _remove(self, session_id: str) -> None:
        gone = self._sessions.pop(session_id)
        self._utterances -= len(gone.utterances)
        self._bytes -= SESSION_BYTES + len(session_id) + sum(map(_bytes_of, gone.utterances.values()))

    def _drop(self, session: "_Session") -> None:
        """The oldest statement of a session goes."""
        self._take_out(session, next(iter(session.utterances)))
        self._dropped += 1

    def _take_out(self, session: "_Session", geoid_id: str) -> bool:
        """Whether there was such a statement."""
        gone = session.utterances.pop(geoid_id, None)
        if gone is None:
            return False
        self._utterances -= 1
        self._bytes -= _bytes_of(gone)
        return True


def _bytes_of(utterance: Utterance) -> int:
    return UTTERANCE_BYTES + len(utterance.geoid_id) + len(utterance.agent_id or "")


@dataclass(slots=True)
class _Session:
    used: float
    utterances: OrderedDict[str, Utterance]
    """By geoid id, the oldest first."""


class SessionRow(Protocol):
    @property
    def id(self) -> str: ...


class Sayings(Protocol):
    """Where it is read back from."""

    async def recent_sessions(self, *, since: int, limit: int) -> Sequence[SessionRow]:
        """Sessions that published at or after ``since`` (unix ms), the latest first."""

    async def last_said(self, sessions: Sequence[str], *, limit: int) -> dict[str, list[tuple[str, str | None, int]]]:
        """By session, its newest statements (geoid id, agent id, unix ms), the newest first."""


SESSIONS_AT_ONCE = 32
"""Sessions read back in one transaction."""


async def recall(
    memory: ConversationMemory, sayings: Sayings, *, now: int, sessions: int, history: int, ttl: float
) -> int:
    """Fill a memory with what was said before the start; what is said meanwhile is kept. Returns how many sessions it was.

    Args:
        now: Unix ms.
        sessions, history, ttl: As of the memory.

    Raises:
        UnavailableError: it cannot be read.
    """
    recent = await sayings.recent_sessions(since=now - int(ttl * 1000), limit=sessions)
    done = 0
    for start in range(0, len(recent), SESSIONS_AT_ONCE):
        ids = [row.id for row in recent[start : start + SESSIONS_AT_ONCE]]
        said = await sayings.last_said(ids, limit=history)
        for session_id in ids:
            newest_last = [
                (geoid, agent, max(0.0, (now - at) / 1000)) for geoid, agent, at in reversed(said[session_id])
            ]
            if not memory.restore(session_id, newest_last):
                return done
            done += 1
    return done
