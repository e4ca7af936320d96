"""The geoid cache: bounded, and never older than the last commit."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from kimera_stream.core.geoid import built
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.protocol.objects import GeoidBody

pytestmark = pytest.mark.anyio


def geoid(geoid_id: str, text: str = "a") -> StoredGeoid:
    body = GeoidBody(text=text)
    return StoredGeoid(built(body, geoid_id=geoid_id, session_id=None, now=1, offset=1, previous=None), None, "p")


class Vault:
    """A source that can be held up in the middle of a read."""

    def __init__(self, *stored: StoredGeoid) -> None:
        self.stored = {each.geoid.id: each for each in stored}
        self.reads: list[list[str]] = []
        self.reading = anyio.Event()
        self.go_on = anyio.Event()
        self.go_on.set()

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]:
        self.reads.append(list(ids))
        found = {each: self.stored[each] for each in ids if each in self.stored}
        self.reading.set()
        await self.go_on.wait()
        return found


@asynccontextmanager
async def held_up(cache: GeoidCache, vault: Vault) -> AsyncIterator[list[StoredGeoid | None]]:
    """A read of "a" is under way within, and goes on at the end; what it found."""
    vault.go_on, vault.reading = anyio.Event(), anyio.Event()
    seen: list[StoredGeoid | None] = []

    async def read() -> None:
        seen.append(await cache.get("a"))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await vault.reading.wait()
        yield seen
        vault.go_on.set()


async def test_what_was_read_once_is_not_read_again() -> None:
    vault = Vault(geoid("a"))
    cache = GeoidCache(vault, 1_000_000)
    assert set(await cache.get_many(["a", "missing"])) == {"a"}
    assert await cache.get("a") is vault.stored["a"]
    assert vault.reads == [["a", "missing"]]
    assert (cache.hits, cache.misses) == (1, 2)


async def test_what_is_read_past_it_takes_no_place_in_it() -> None:
    vault = Vault(geoid("a"), geoid("b"))
    cache = GeoidCache(vault, 1)  # one of them at most
    await cache.get("a")
    assert set(await cache.get_many(["a", "b"], keep=False)) == {"a", "b"}
    await cache.get("a")
    assert vault.reads == [["a"], ["b"]]


async def test_it_stays_within_its_bytes_and_drops_the_least_used() -> None:
    cache = GeoidCache(Vault(), 10_000)
    for number in range(100):
        cache.put(geoid(f"g{number}", "x" * 100))
    assert cache.bytes <= 10_000
    assert 0 < len(cache) < 100
    assert await cache.get("g99") is not None
    for number in range(100):
        cache.remove(f"g{number}", 2)
    assert (len(cache), cache.bytes) == (0, 0)


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_slow_read_does_not_undo_a_commit_made_meanwhile(deleted: bool) -> None:
    vault = Vault(geoid("a", "old"))
    cache = GeoidCache(vault, 1_000_000)
    async with held_up(cache, vault) as seen:
        if deleted:
            cache.remove("a", 2)
            del vault.stored["a"]
        else:
            cache.put(geoid("a", "new"))
    assert [each and each.geoid.text for each in seen] == [None if deleted else "new"]
    kept = await cache.get("a")
    assert (None if kept is None else kept.geoid.text) == (None if deleted else "new")


async def test_what_is_dropped_for_want_of_room_during_a_read_is_not_taken_for_deleted() -> None:
    vault = Vault(geoid("a", "old"))
    vault.go_on = anyio.Event()
    cache = GeoidCache(vault, 1)
    seen: list[str | None] = []

    async def read() -> None:
        seen.append((await cache.get_many(["a"]))["a"].geoid.text)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await vault.reading.wait()
        cache.put(geoid("a", "new"))
        cache.put(geoid("b"))
        vault.go_on.set()
    assert seen == ["new"]


async def test_an_older_version_than_the_log_tells_of_is_read_again_and_one_in_doubt_as_well() -> None:
    vault = Vault(geoid("a", "old"))
    cache = GeoidCache(vault, 1_000_000)
    await cache.get("a")
    cache.expect("a", 1)
    await cache.get("a")
    assert len(vault.reads) == 1
    cache.expect("a", 2)
    async with held_up(cache, vault) as seen:
        cache.forget("a")  # says nothing about whether it is there
    assert seen == [vault.stored["a"]]
    assert len(vault.reads) == 2


async def test_a_writer_that_hears_late_of_its_own_commit_does_not_undo_what_the_log_told_since() -> None:
    vault = Vault(at("a", 3), at("b", 4))
    cache = GeoidCache(vault, 1_000_000)
    cache.follow(5, [at("a", 3), at("b", 4)], ["gone"])
    cache.committed([at("a", 1), at("gone", 2)], [("b", 2)])
    assert [found and found.geoid.offset for found in [await cache.get(each) for each in ("a", "b", "gone")]] == [
        3,
        4,
        None,
    ]
    cache.committed([at("a", 6)], [("b", 7)])
    del vault.stored["b"]
    assert [found and found.geoid.offset for found in [await cache.get(each) for each in ("a", "b")]] == [6, None]


async def test_what_is_deleted_and_said_anew_during_a_read_is_there() -> None:
    vault = Vault(at("a", 1))
    cache = GeoidCache(vault, 1_000_000)
    async with held_up(cache, vault) as seen:
        cache.remove("a", 2)
        cache.put(at("a", 3))
    assert [each and each.geoid.offset for each in seen] == [3]


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_writer_that_hears_late_of_its_own_commit_does_not_undo_what_a_read_has_found(deleted: bool) -> None:
    vault = Vault(at("a", 11))
    cache = GeoidCache(vault, 1_000_000)
    async with held_up(cache, vault) as seen:
        cache.committed([] if deleted else [at("a", 10)], [("a", 10)] if deleted else [])
    assert [each and each.geoid.offset for each in (*seen, await cache.get("a"))] == [11, 11]
    cache.committed([at("a", 10)], [])
    assert (kept := await cache.get("a")) is not None
    assert kept.geoid.offset == 11


@pytest.mark.parametrize("deleted", [False, True])
async def test_what_is_there_at_once_is_not_older_than_what_was_written_while_the_rest_was_read(deleted: bool) -> None:
    vault = Vault(at("a", 6), at("b", 7))
    cache = GeoidCache(vault, 1_000_000)
    await cache.get("a")
    vault.go_on, vault.reading = anyio.Event(), anyio.Event()
    seen: list[dict[str, int]] = []

    async def read() -> None:
        seen.append({name: each.geoid.offset for name, each in (await cache.get_many(["a", "b"])).items()})

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await vault.reading.wait()
        cache.follow(12, [] if deleted else [at("a", 10)], ["a"] if deleted else [])
        vault.go_on.set()
    assert seen == [{"b": 7} if deleted else {"a": 10, "b": 7}]
    cache.follow(7, [at("a", 6)], [])  # another reader of the log, which is further back
    assert (kept := await cache.get("a")) is not None
    assert kept.geoid.offset == (6 if deleted else 10)


def at(geoid_id: str, offset: int) -> StoredGeoid:
    body = GeoidBody(text="a")
    return StoredGeoid(built(body, geoid_id=geoid_id, session_id=None, now=1, offset=offset, previous=None), None, "p")
