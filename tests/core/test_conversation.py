"""Conversation memory: bounded by sessions, by history and by age; checked against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kimera_stream.core.conversation import (
    SESSION_BYTES,
    SESSIONS_AT_ONCE,
    UTTERANCE_BYTES,
    ConversationMemory,
    Utterance,
    recall,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ids(memory: ConversationMemory, session: str, limit: int | None = None) -> list[str]:
    return [utterance.geoid_id for utterance in memory.history(session, limit)]


def test_what_is_restored_comes_before_what_is_said(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    memory.remember("live", "d")
    assert memory.restore("live", [("a", None, 4.0), ("b", "bot", 3.0), ("c", None, 2.0), ("d", None, 1.0)])
    assert ids(memory, "live") == ["b", "c", "d"]
    assert memory.history("live", 3)[0] == Utterance("b", "bot", 97.0)
    assert memory.restore("older", [("x", None, 50.0), ("y", None, 40.0)])
    assert not memory.restore("oldest", [("z", None, 55.0)]), "no recent session is evicted for an older one"
    assert memory.statistics().utterances == 5
    memory.remember("new", "n")
    assert "older" not in memory
    assert "live" in memory
    clock.now += 59
    assert memory.statistics().sessions == 2


def test_what_is_restored_counts_against_the_bytes(clock: Clock) -> None:
    memory = ConversationMemory(sessions=9, history=9, ttl=60, max_bytes=4_000, clock=clock)
    said = [(f"geoid-{n}", "bot", 1.0) for n in range(3)]
    restored = [memory.restore(f"s{n}", said) for n in range(9)]
    assert restored == sorted(restored, reverse=True)
    assert True in restored
    assert False in restored
    assert 0 < memory.statistics().bytes <= 4_000
    for n in range(9):
        memory.forget(f"s{n}")
    assert memory.statistics().bytes == 0


def test_what_is_too_old_is_not_restored(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    assert memory.restore("s", [("a", None, 61.0)])
    assert "s" not in memory
    assert memory.restore("s", [("a", None, 61.0), ("b", None, 59.0)])
    assert ids(memory, "s") == ["b"]


@pytest.mark.anyio
async def test_the_most_recent_sessions_are_recalled(clock: Clock) -> None:
    class Row:
        def __init__(self, id: str) -> None:
            self.id = id

    class Sayings:
        async def recent_sessions(self, *, since: int, limit: int) -> list[Row]:
            assert since == 1_000_000 - 60_000
            return [Row(f"s{n}") for n in range(100)][:limit]

        async def last_said(self, sessions, *, limit: int):
            assert len(sessions) <= SESSIONS_AT_ONCE
            return {each: [(f"{each}-2", None, 1_000_000), (f"{each}-1", "bot", 990_000)][:limit] for each in sessions}

    memory = ConversationMemory(sessions=70, history=9, ttl=60, clock=clock)
    assert await recall(memory, Sayings(), now=1_000_000, sessions=70, history=9, ttl=60) == 70
    memory.remember("new", "x")
    assert "s69" not in memory, "the least recent one makes room"
    assert ids(memory, "s68") == ["s68-1", "s68-2"]


def test_history_is_oldest_first_and_bounded(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    for geoid in ("a", "b", "c", "d"):
        memory.remember("s", geoid, agent_id="bot")
        clock.now += 1
    assert ids(memory, "s") == ["b", "c", "d"]
    assert ids(memory, "s", 2) == ["c", "d"]
    assert ids(memory, "s", 0) == []
    assert ids(memory, "s", 9) == ["b", "c", "d"]
    assert memory.history("s", 1) == [Utterance("d", "bot", 103.0)]
    assert memory.statistics().dropped == 1


def test_a_statement_made_anew_becomes_the_newest_and_is_not_there_twice(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    for geoid in ("a", "b", "a"):
        memory.remember("s", geoid)
    assert ids(memory, "s") == ["b", "a"]
    assert memory.statistics().utterances == 2


def test_least_recently_used_session_goes_first_and_reading_is_a_use(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    memory.remember("one", "a")
    memory.remember("two", "b")
    memory.history("one")
    memory.remember("three", "c")
    assert "two" not in memory
    assert ids(memory, "one") == ["a"]
    assert memory.statistics().evicted == 1


def test_a_quiet_session_expires_exactly_at_its_age(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    memory.remember("s", "a")
    clock.now += 59.9
    assert "s" in memory
    clock.now += 0.1
    assert ids(memory, "s") == []
    statistics = memory.statistics()
    assert (statistics.sessions, statistics.utterances, statistics.expired) == (0, 0, 1)


def test_forgetting(clock: Clock) -> None:
    memory = ConversationMemory(sessions=2, history=3, ttl=60, clock=clock)
    memory.remember("s", "a")
    memory.remember("s", "b")
    assert memory.forget("s", "a") is True
    assert memory.forget("s", "a") is False
    assert ids(memory, "s") == ["b"]
    assert memory.forget("s") is True
    assert memory.forget("s") is False
    assert memory.forget("s", "b") is False
    assert memory.statistics().utterances == 0


def test_all_sessions_together_are_bounded_in_bytes(clock: Clock) -> None:
    bound = 20_000
    memory = ConversationMemory(sessions=1_000, history=1_000, ttl=60, max_bytes=bound, clock=clock)
    for number in range(500):
        memory.remember(f"session {number % 60}", "g" * 128, agent_id="a" * 64)
        assert memory.statistics().bytes <= bound
    assert memory.statistics().evicted > 0
    for number in range(500):  # a single session that takes it all keeps its newest
        memory.remember("long", f"g{number}")
        assert memory.statistics().bytes <= bound
    assert memory.statistics().sessions == 1
    assert ids(memory, "long")[-1] == "g499"
    assert memory.statistics().dropped > 0
    memory.forget("long")
    assert memory.statistics().bytes == 0


def test_one_statement_is_kept_however_small_the_bound(clock: Clock) -> None:
    memory = ConversationMemory(sessions=5, history=5, ttl=60, max_bytes=1, clock=clock)
    memory.remember("s", "a")
    memory.remember("t", "b")
    assert "s" not in memory
    assert ids(memory, "t") == ["b"]


def test_asking_does_not_make_a_session(clock: Clock) -> None:
    memory = ConversationMemory(sessions=1, history=1, ttl=60, clock=clock)
    memory.remember("s", "a")
    assert memory.history("other") == []
    assert ids(memory, "s") == ["a"]


@pytest.mark.parametrize("wrong", [{"sessions": 0}, {"history": 0}, {"ttl": 0}, {"ttl": float("nan")}])
def test_bounds_are_required(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected sessions >= 1"):
        ConversationMemory(**{"sessions": 1, "history": 1, "ttl": 1} | wrong)  # type: ignore[arg-type]


SESSIONS = st.sampled_from("pqrst")
GEOIDS = st.sampled_from("abcdef")


class AgainstModel(RuleBasedStateMachine):
    """The model keeps plain lists and scans them all."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.memory = ConversationMemory(sessions=3, history=3, ttl=10, clock=self.clock)
        self.model: list[tuple[str, float, list[str]]] = []  # (session, used, geoids), least recently used first

    def take(self, session: str) -> list[str] | None:
        self.model = [entry for entry in self.model if self.clock.now - entry[1] < 10]
        found = [entry for entry in self.model if entry[0] == session]
        self.model = [entry for entry in self.model if entry[0] != session]
        return found[0][2] if found else None

    @rule(session=SESSIONS, geoid=GEOIDS)
    def remember(self, session: str, geoid: str) -> None:
        self.memory.remember(session, geoid)
        geoids = [other for other in self.take(session) or [] if other != geoid]
        self.model = [*self.model[-2:], (session, self.clock.now, [*geoids, geoid][-3:])]

    @rule(session=SESSIONS)
    def history(self, session: str) -> None:
        geoids = self.take(session)
        assert ids(self.memory, session) == (geoids or [])
        if geoids is not None:
            self.model.append((session, self.clock.now, geoids))

    @rule(session=SESSIONS)
    def forget(self, session: str) -> None:
        assert self.memory.forget(session) is (self.take(session) is not None)

    @rule(seconds=st.integers(1, 11))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        alive = [entry for entry in self.model if self.clock.now - entry[1] < 10]
        statistics = self.memory.statistics()
        assert statistics.sessions == len(alive) <= 3
        assert statistics.utterances == sum(len(geoids) for _, _, geoids in alive)
        assert statistics.bytes == len(alive) * (SESSION_BYTES + 1) + statistics.utterances * (UTTERANCE_BYTES + 1)


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
