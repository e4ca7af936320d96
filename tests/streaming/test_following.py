"""A log that other nodes write reaches the hub whole and in order, whatever the bus does with what is told."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream.core.interfaces import LogPage
from kimera_stream.core.relay import pack_entries, unpack_entries
from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.streaming.following import MOST_EARLY, MOST_EARLY_BYTES, Following
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.recent import Recent

pytestmark = pytest.mark.anyio


def entry(offset: int, size: int = 2) -> LogEntry:
    return LogEntry(offset, "geoid.created", 1_000 + offset, ("geoids", f"geoid:{offset}"), msgspec.Raw(b"1" * size))


class Log:
    """The truth, which other nodes write."""

    epoch = "e"

    def __init__(self) -> None:
        self.head = 0
        self.committed = 0
        self.trimmed = 0
        self.reads = 0
        self.broken = False
        self.read_broken = anyio.Event()

    async def refresh(self) -> int:
        await anyio.lowlevel.checkpoint()
        if self.broken:
            self.read_broken.set()
            raise UnavailableError("away")
        self.head = self.committed
        return self.head

    async def read(self, channel: Any, *, after: int, limit: int, until: Any = None, reverse: bool = False) -> LogPage:
        await anyio.lowlevel.checkpoint()
        self.reads += 1
        last = min(self.committed, until, max(after, self.trimmed) + limit)
        found = [entry(offset) for offset in range(max(after, self.trimmed) + 1, last + 1)]
        return LogPage(found, last, more=last < until)


class Heard:
    """The sink."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.changed = anyio.Event()

    def __call__(self, entries: Any) -> None:
        self.offsets += [each.offset for each in entries]
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(10):
            while not condition():
                self.changed = anyio.Event()
                await self.changed.wait()


@asynccontextmanager
async def following(log: Log, heard: Heard, poll: float = 60.0) -> AsyncIterator[Following]:
    made = Following(log, heard, position=0, poll=poll)  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        group.start_soon(made.run)
        yield made
        group.cancel_scope.cancel()


async def test_what_is_told_in_order_is_passed_on_at_once_and_once() -> None:
    heard = Heard()
    made = Following(Log(), heard, position=2, poll=60.0)  # type: ignore[arg-type]
    made.heard([entry(1), entry(2), entry(3)])
    made.heard([entry(3), entry(4)])
    assert heard.offsets == [3, 4]
    assert (made.position, made.told, made.read) == (4, 2, 0)


async def test_what_is_told_early_waits_for_its_turn() -> None:
    log, heard = Log(), Heard()
    async with following(log, heard) as made:
        made.heard([entry(3)])
        made.heard([entry(2)])
        made.heard([entry(1)])
        assert heard.offsets == [1, 2, 3]
    assert log.reads == 0


async def test_what_is_not_told_is_read() -> None:
    log, heard = Log(), Heard()
    log.committed = 2_345
    async with following(log, heard) as made:
        made.heard([entry(2_345)])
        await heard.until(lambda: made.position == 2_345)
    assert heard.offsets == list(range(1, 2_346))
    assert made.read == 2_344 + 1 - made.told


async def test_a_page_that_was_told_while_it_was_read_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log, heard = Log(), Heard()
    log.committed = 2_500
    reading = log.read

    async def telling(channel: Any, *, after: int, **how: Any) -> LogPage:
        page = await reading(channel, after=after, **how)
        if not after:
            made.heard(page.entries)
        return page

    monkeypatch.setattr(log, "read", telling)
    async with following(log, heard) as made:
        made.lost()
        await heard.until(lambda: made.position >= 2_500)
    assert heard.offsets == list(range(1, 2_501))


@pytest.mark.parametrize("word", ["nothing", "lost"])
async def test_a_silent_bus_costs_a_poll_and_nothing_else(word: str) -> None:
    log, heard = Log(), Heard()
    async with following(log, heard, poll=0.01 if word == "nothing" else 60.0) as made:
        log.committed = 3
        if word == "lost":
            made.lost()
        await heard.until(lambda: heard.offsets == [1, 2, 3])
        log.committed = 5
        made.lost()
        await heard.until(lambda: heard.offsets == [1, 2, 3, 4, 5])


async def test_it_goes_on_when_the_log_can_be_read_again() -> None:
    log, heard = Log(), Heard()
    log.broken, log.committed = True, 2
    async with following(log, heard, poll=0.01) as made:
        await log.read_broken.wait()
        made.heard([entry(1)])  # what the bus tells needs no log
        assert heard.offsets == [1]
        log.broken = False
        await heard.until(lambda: heard.offsets == [1, 2])


async def test_what_retention_has_dropped_is_passed_over_and_the_rest_is_not() -> None:
    log, heard = Log(), Heard()
    log.committed, log.trimmed = 9, 6
    async with following(log, heard) as made:
        made.lost()
        await heard.until(lambda: made.position == 9)
    assert heard.offsets == [7, 8, 9]


async def test_too_much_before_its_turn_is_forgotten_and_read() -> None:
    log, heard = Log(), Heard()
    log.committed = MOST_EARLY + 2
    async with following(log, heard) as made:
        made.heard([entry(offset) for offset in range(2, MOST_EARLY + 3)])
        assert heard.offsets == []
        await heard.until(lambda: made.position == log.committed)
    assert heard.offsets == list(range(1, MOST_EARLY + 3))


async def test_few_large_ones_before_their_turn_are_too_much_as_well() -> None:
    log, heard = Log(), Heard()
    large = MOST_EARLY_BYTES // 4
    log.committed = 7
    async with following(log, heard) as made:
        made.heard([entry(offset, large) for offset in (2, 3, 4)])
        made.heard([entry(2, large)])
        kept = made.early_bytes
        assert 3 * large < kept <= MOST_EARLY_BYTES
        made.heard([entry(6, large), entry(7, large)])
        assert made.early_bytes == 0
        assert heard.offsets == []
        await heard.until(lambda: made.position == 7)
        made.heard([entry(9, large)])
        made.heard([entry(8)])
        assert made.early_bytes == 0, "what was passed on is not counted any more"
    assert heard.offsets == list(range(1, 10))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), max_size=10), max_size=10))
def test_any_order_and_repetition_comes_out_whole(told: list[list[int]]) -> None:
    async def follow() -> None:
        log, heard = Log(), Heard()
        log.committed = 30
        async with following(log, heard) as made:
            for offsets in told:
                made.heard([entry(offset) for offset in offsets])
                await anyio.lowlevel.checkpoint()
            made.lost()
            await heard.until(lambda: made.position == 30)
        assert heard.offsets == list(range(1, 31))

    anyio.run(follow)


def test_entries_travel_as_they_are_and_in_messages_of_bounded_size() -> None:
    entries = [entry(offset, size=100_000) for offset in range(1, 8)]
    messages = list(pack_entries(entries))
    assert [each for message in messages for each in unpack_entries(message)] == entries
    assert len(messages) > 1
    assert max(map(len, messages)) < 300_000
    with pytest.raises(msgspec.MsgspecError):
        unpack_entries(b"\xc1")


async def test_what_was_said_lately_is_read_from_memory_and_the_rest_from_the_log() -> None:
    log = Log()
    hub = Hub(log, StreamSettings(tail_bytes=2_000))  # type: ignore[arg-type]
    hub.deliver([entry(offset) for offset in range(1, 11)])
    hub.flush()
    log.committed = 12
    recent = Recent(hub, log)  # type: ignore[arg-type]
    page = await recent.read("geoid:9", after=8, limit=10, until=10)
    assert ([each.offset for each in page.entries], page.more, log.reads) == ([9], False, 0)
    assert not hub.tail.covers(2)
    await recent.read("geoid:3", after=2, limit=10, until=10)
    assert log.reads == 1, "the tail does not reach back so far"
    page = await recent.read("geoids", after=8, limit=10, until=12)
    assert log.reads == 2, "not everything was delivered here yet"
    assert page.entries[-1].offset == 12
