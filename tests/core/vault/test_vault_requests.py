"""Accepted requests that are kept, and those that are set aside."""

from dataclasses import replace

import pytest

from kimera_stream.core.kept import CheckpointRequest, DeadLetter
from kimera_stream.core.vault import tools
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio

ITEMS = [
    CheckpointRequest("ann", b'{"text":"one"}', session_id="s", key="k", priority=9, accepted_at=5),
    CheckpointRequest("bob", b'{"text":"two"}', key="k", merge=True, must_exist=True, attempts=3),
]


def tried(items):
    return [replace(item, attempts=item.attempts + 1) for item in items]


def letter(item, **changes):
    return DeadLetter(**{"request": item, "failed_at": 70, "code": "not_found", "message": "there is none", **changes})


async def refs_of(vault):
    return [item.ref for item in await vault.take_up(due=2**60, held_until=0, limit=99)]


async def test_what_is_kept_is_taken_up_in_order_and_stays_until_it_is_settled(vault, url, make_settings):
    await vault.save_checkpoint(ITEMS, node="n1")
    await vault.save_checkpoint([], node="n2")
    again = SqlVault(url, make_settings())
    await again.start()
    try:
        assert await again.take_up(due=10, held_until=100, limit=9) == tried(ITEMS)
        assert await vault.take_up(due=99, held_until=200, limit=9) == [], "somebody holds them"
        taken = await vault.take_up(due=100, held_until=200, limit=9)
        assert taken == tried(tried(ITEMS)), "whoever held them let their time go by"
        await again.settle([taken[0].ref])
        (left,) = await vault.take_up(due=2**60, held_until=300, limit=9)
        assert left == tried(taken)[1]
        await vault.settle([left.ref, ("unknown", 0)])
        assert await again.take_up(due=2**60, held_until=0, limit=9) == []
    finally:
        await again.close()


async def test_what_is_put_off_waits_and_an_attempt_can_be_taken_back(vault):
    await vault.save_checkpoint(ITEMS)
    first, second = await vault.take_up(due=0, held_until=50, limit=9)
    await vault.put_off([first.ref], until=400, attempts=-1)
    assert await vault.take_up(due=399, held_until=500, limit=9) == [replace(second, attempts=5)]
    assert await vault.take_up(due=400, held_until=500, limit=9) == [first]


async def test_what_was_held_by_a_process_that_is_gone_is_released(vault):
    await vault.save_checkpoint(ITEMS)
    await vault.take_up(due=0, held_until=50, limit=9)
    await vault.release()
    assert await vault.take_up(due=0, held_until=50, limit=9) == tried(tried(ITEMS))


async def test_what_was_accepted_is_looked_after_while_a_commit_lasts_too_long(vault, monkeypatch):
    """It waits for its turn: refused, a stop would lose what it could have kept."""

    def refuse():
        raise UnavailableError("a commit hangs")

    monkeypatch.setattr(vault.commits, "admit", refuse)
    with pytest.raises(UnavailableError):
        await vault.save_cursor("ann", "c", "geoids", 1)
    await vault.save_checkpoint(ITEMS)
    first, second = await vault.take_up(due=0, held_until=50, limit=9)
    await vault.put_off([first.ref], until=40, attempts=-1)
    await vault.release()
    assert await vault.take_up(due=0, held_until=50, limit=9) == [first, replace(second, attempts=5)]
    await vault.settle([first.ref])
    await vault.set_aside([letter(second)], most=9)
    assert (await refs_of(vault), await vault.count_dead_letters()) == ([], 1)


async def test_no_more_are_taken_up_than_asked_for(vault):
    await vault.save_checkpoint([replace(ITEMS[0], key=f"k{n}") for n in range(5)])
    assert [item.key for item in await vault.take_up(due=0, held_until=9, limit=3)] == ["k0", "k1", "k2"]
    assert [item.key for item in await vault.take_up(due=0, held_until=9, limit=3)] == ["k3", "k4"]


async def test_what_a_commit_does_is_kept_no_longer(vault, samples):
    await vault.save_checkpoint(ITEMS)
    refs = await refs_of(vault)
    batch = samples.publish(0, "a")
    batch.settled.append(refs[0])
    await vault.commit(batch)
    assert await refs_of(vault) == refs[1:]


async def test_dead_letters_are_bounded_and_kept_in_order(vault, url):
    await vault.save_checkpoint(ITEMS)
    first, second = await vault.take_up(due=0, held_until=9, limit=9)
    assert await vault.set_aside([letter(first)], most=2) == 0
    assert await vault.take_up(due=2**60, held_until=0, limit=9) == tried([second])
    assert await vault.set_aside([letter(second, code="internal"), letter(ITEMS[0], failed_at=71)], most=2) == 1
    kept = await tools.dead_letters(url)
    assert [(each.request.key, each.code, each.failed_at) for each in kept] == [
        ("k", "internal", 70),
        ("k", "not_found", 71),
    ]
    assert kept[0].request == second
    assert await tools.dead_letters(url, after=kept[0].id) == kept[1:]
    assert await vault.count_dead_letters() == 2
    assert await refs_of(vault) == []


async def test_dead_letters_are_tried_again_from_the_start_or_dropped(vault, url):
    await vault.set_aside([letter(item, failed_at=n) for n, item in enumerate([*ITEMS, *ITEMS])], most=9)
    ids = [each.id for each in await tools.dead_letters(url)]
    assert await tools.retry_dead_letters(url, [ids[2], 999_999, ids[0], ids[0], ids[1]]) == ids[:3]
    assert await tools.drop_dead_letters(url, [ids[0], ids[3]]) == ids[3:]
    assert await tools.retry_dead_letters(url, []) == []
    assert await vault.count_dead_letters() == 0
    fresh = [replace(item, attempts=1) for item in [*ITEMS, ITEMS[0]]]
    assert await vault.take_up(due=0, held_until=9, limit=9) == fresh
