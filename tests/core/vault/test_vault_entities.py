"""Geoids, contradictions and scars as rows and back."""

import math

import numpy as np
import pytest
from sqlalchemy import select, text

from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.vault import schema
from kimera_stream.core.vault.errors import DamagedVaultError
from kimera_stream.infrastructure.database import Query

pytestmark = pytest.mark.anyio


async def test_a_geoid_comes_back_exactly(vault, samples):
    geoid = samples.geoid(
        "g-1",
        1,
        text="naïve \x00? no: 'quoted' \"text\" 語 \\".replace("\x00", ""),
        semantic_state={"z": 0.1 + 0.2, "a": 1e-300, "m": 1.0},
        symbolic_state={"up": True, "n": 1, "f": 1.0, "s": "1", "none": None, "big": 2**63 - 1, "neg": -0.5},
        metadata={"source": {"deep": [1, 2.5, None, "x"]}, "b": True},
        session_id="s",
        originator_agent_id="ag",
        purpose="why",
        entropy=math.log2(3),
    )
    vector = np.array([0.1, -2.5, 3e-38, 0.0], dtype=np.float32)
    batch = WriteBatch(entries=[samples.entry(1, geoid)], geoids=[StoredGeoid(geoid, vector, "bob")])
    await vault.commit(batch)
    stored = await vault.geoid("g-1")
    assert stored.geoid == geoid
    assert list(stored.geoid.semantic_state) == ["z", "a", "m"]
    assert [(k, type(v)) for k, v in stored.geoid.symbolic_state.items()] == [
        ("up", bool), ("n", int), ("f", float), ("s", str), ("none", type(None)), ("big", int), ("neg", float),
    ]  # fmt: skip
    assert stored.principal == "bob"
    assert stored.vector.dtype == np.float32
    assert stored.vector.flags.c_contiguous
    assert stored.vector.flags.writeable
    np.testing.assert_array_equal(stored.vector, vector)


async def test_an_update_replaces_the_statement_and_keeps_its_versions(vault, samples):
    first = samples.geoid("g", 1, semantic_state={"a": 0.5, "b": 0.5}, symbolic_state={"up": True})
    second = samples.geoid("g", 2, version=2, text=None, semantic_state={"b": 1.0})
    for geoid, type_ in ((first, "geoid.created"), (second, "geoid.updated")):
        await vault.commit(
            WriteBatch(entries=[samples.entry(geoid.offset, geoid, type_)], geoids=[StoredGeoid(geoid, None, "p")])
        )
    stored = await vault.geoid("g")
    assert stored.geoid == second
    assert stored.vector is None
    versions = Query(
        select(schema.geoid_version.c.version, schema.geoid_version.c.text).order_by(schema.geoid_version.c.offset)
    )
    rows = await vault._database.read(lambda tx: [tuple(row) for row in tx.rows(versions)])
    assert rows == [(1, "statement g"), (2, None)]


async def test_created_and_updated_in_one_batch_leaves_the_newest(vault, samples):
    first = samples.geoid("g", 1, semantic_state={"a": 1.0})
    second = samples.geoid("g", 2, version=2, semantic_state={"b": 1.0})
    await vault.commit(
        WriteBatch(
            entries=[samples.entry(1, first), samples.entry(2, second, "geoid.updated")],
            geoids=[StoredGeoid(first, None, "p"), StoredGeoid(second, None, "p")],
        )
    )
    assert (await vault.geoid("g")).geoid == second
    assert await vault.count_geoids() == 1


async def test_a_deleted_geoid_is_gone_with_its_features_and_may_come_back(vault, samples):
    geoid = samples.geoid("g", 1, semantic_state={"a": 1.0}, symbolic_state={"k": "v"})
    await vault.commit(WriteBatch(entries=[samples.entry(1, geoid)], geoids=[StoredGeoid(geoid, None, "p")]))
    await vault.commit(WriteBatch(entries=[samples.entry(2, geoid, "geoid.deleted")], deleted=[("g", 2)]))
    assert await vault.geoid("g") is None
    assert await vault.count_geoids() == 0
    for table in ("semantic_feature", "symbolic_feature"):
        count = Query(text(f"SELECT count(*) FROM {table}"))
        assert await vault._database.read(lambda tx, count=count: tx.value(count)) == 0
    again = samples.geoid("g", 3, semantic_state={"c": 1.0})
    await vault.commit(WriteBatch(entries=[samples.entry(3, again)], geoids=[StoredGeoid(again, None, "p")]))
    assert (await vault.geoid("g")).geoid == again


@pytest.mark.parametrize("existing", [False, True])
async def test_said_and_deleted_in_one_batch_is_gone(vault, samples, existing):
    head = 0
    if existing:
        await vault.commit(samples.publish(0, "g"))
        head = 1
    geoid = samples.geoid("g", head + 1, version=2 if existing else 1)
    await vault.commit(
        WriteBatch(
            entries=[samples.entry(head + 1, geoid), samples.entry(head + 2, geoid, "geoid.deleted")],
            geoids=[StoredGeoid(geoid, None, "p")],
            deleted=[("g", head + 2)],
        )
    )
    assert await vault.geoid("g") is None
    newest = Query(select(schema.geoid_version.c.deleted).order_by(schema.geoid_version.c.offset.desc()))
    assert bool(await vault._database.read(lambda tx: tx.value(newest)))


async def test_deleted_and_said_again_in_one_batch_is_there(vault, samples):
    await vault.commit(samples.publish(0, "g"))
    again = samples.geoid("g", 3, text="again")
    await vault.commit(
        WriteBatch(
            entries=[samples.entry(2, again, "geoid.deleted"), samples.entry(3, again)],
            geoids=[StoredGeoid(again, None, "p")],
            deleted=[("g", 2)],
        )
    )
    assert (await vault.geoid("g")).geoid == again


async def test_many_geoids_by_id(vault, samples):
    ids = [f"g{i}" for i in range(700)]
    await vault.commit(samples.publish(0, *ids, semantic_state={"a": 0.25}, symbolic_state={"n": 1}))
    found = await vault.geoids([*ids, "unknown"])
    assert set(found) == set(ids)
    assert all(stored.geoid.semantic_state == {"a": 0.25} for stored in found.values())
    assert await vault.geoids([]) == {}


async def test_lists_page_in_offset_order_and_by_session_and_agent(vault, samples):
    await vault.commit(samples.publish(0, "a", "b", session_id="s1", originator_agent_id="x"))
    await vault.commit(samples.publish(2, "c", "d", "e", session_id="s2", originator_agent_id="x"))
    first = await vault.list_geoids(after=0, limit=2)
    assert ([g.id for g in first.items], first.next) == (["a", "b"], 2)
    second = await vault.list_geoids(after=2, limit=3)
    assert ([g.id for g in second.items], second.next) == (["c", "d", "e"], None)
    assert [g.id for g in (await vault.list_geoids(after=0, limit=9, session_id="s2")).items] == ["c", "d", "e"]
    both = await vault.list_geoids(after=3, limit=9, session_id="s2", agent_id="x")
    assert [g.id for g in both.items] == ["d", "e"]
    assert (await vault.list_geoids(after=0, limit=9, agent_id="nobody")).items == []


async def test_a_scan_sees_every_live_geoid_once_with_its_vector(vault, samples):
    await vault.commit(samples.publish(0, *[f"g{i}" for i in range(25)], symbolic_state={"k": 1}))
    geoid = samples.geoid("g3", 26, version=2)
    await vault.commit(
        WriteBatch(
            entries=[samples.entry(26, geoid, "geoid.updated"), samples.entry(27, geoid, "geoid.deleted")],
            geoids=[StoredGeoid(geoid, None, "p")],
            deleted=[("g5", 27)],
        )
    )
    batches = [batch async for batch in vault.scan_columns(batch=10, dimension=8)]
    assert [len(batch) for batch in batches] == [10, 10, 4]
    ids = [geoid_id for batch in batches for geoid_id in batch.ids]
    assert ids == [f"g{i}" for i in range(25) if i not in (3, 5)] + ["g3"]
    np.testing.assert_array_equal(batches[0].vectors[0], samples.vector(1))
    assert batches[0].symbols[0] == {"k": 1}
    assert not batches[2].has_vector[-1]
    assert batches[2].symbols[-1] == {}


async def test_columns_hold_what_was_committed_whatever_it_is_made_of(vault, samples):
    texts = ["plain", None, "", 'quotes " and \\ and \x1e\x1f\x7f', "umlauts äöü, 中文, 🐢", "line\nbreak"]
    states = [
        {"a": 1, "b": 1.0, "c": True, "d": None, "e": "1", 'ü"x': "\\n'"},
        {},
        {"big": 2**60, "small": -0.5},
        {"subject": "the pump"},
        {},
        {"": ""},
    ]
    layers = [{}, {"joy": 0.5}, {'a "b" c': 1.0, "z": 0.0}, {}, {"ä": 0.25}, {}]
    batch = WriteBatch()
    for offset, (said, symbols, semantic) in enumerate(zip(texts, states, layers, strict=True), 1):
        geoid = samples.geoid(f"g{offset}", offset, text=said, symbolic_state=symbols, semantic_state=semantic)
        batch.entries.append(samples.entry(offset, geoid))
        batch.geoids.append(StoredGeoid(geoid, samples.vector(offset) if offset % 3 else None, "p"))
    await vault.commit(batch)
    (found,) = [each async for each in vault.scan_columns(batch=100, dimension=8)]
    assert list(found.ids) == [f"g{i}" for i in range(1, 7)]
    assert list(found.texts) == texts
    assert [dict(state) for state in found.symbols] == states
    assert [[type(value) for value in state.values()] for state in found.symbols] == [
        [type(value) for value in state.values()] for state in states
    ]
    assert [sorted(names) for names in found.layers] == [sorted(semantic) for semantic in layers]
    assert found.has_vector.tolist() == [True, True, False, True, True, False]
    np.testing.assert_array_equal(found.vectors, np.stack([samples.vector(i) for i in (1, 2, 4, 5)]))
    found.vectors[0] = 0  # of its own


async def test_a_vector_of_another_length_is_damage(vault, samples):
    await vault.commit(samples.publish(0, "a", "b"))
    with pytest.raises(DamagedVaultError, match=r"between 1 and 2.*not of 9 numbers"):
        [each async for each in vault.scan_columns(batch=10, dimension=9)]


async def test_a_scan_of_an_empty_vault_is_empty(vault):
    assert [each async for each in vault.scan_columns(batch=10, dimension=8)] == []


async def _with_contradictions(vault, samples):
    found = [
        samples.contradiction("c1", "a", "b", 4, score=0.9),
        samples.contradiction("c2", "b", "c", 5, score=0.5, provisional=True, a_text=None, b_text="bt"),
        samples.contradiction("c3", "a", "c", 6, score=0.7),
    ]
    await vault.commit(samples.publish(0, "a", "b", "c"))
    await vault.commit(WriteBatch(entries=[samples.found(c) for c in found], contradictions=found))
    return found


async def test_a_contradiction_comes_back_exactly(vault, samples):
    found = await _with_contradictions(vault, samples)
    for one in found:
        assert await vault.contradiction(one.id) == one
    assert await vault.contradiction("unknown") is None


async def test_contradictions_are_upserts_and_page_by_filter(vault, samples):
    found = await _with_contradictions(vault, samples)
    resolved = samples.contradiction("c1", "a", "b", 7, state="resolved", version=2)
    await vault.commit(
        WriteBatch(entries=[samples.found(resolved, "contradiction.resolved")], contradictions=[resolved])
    )
    assert await vault.contradiction("c1") == resolved
    assert (await vault.count_contradictions("open"), await vault.count_contradictions("resolved")) == (2, 1)

    async def ids(**filters):
        return [c.id for c in (await vault.list_contradictions(after=0, limit=9, **filters)).items]

    assert await ids() == ["c2", "c3", "c1"]
    assert await ids(state="open") == ["c2", "c3"]
    assert await ids(min_score=0.7) == ["c3", "c1"]
    assert await ids(geoid_id="b") == ["c2", "c1"]
    assert await ids(geoid_id="b", state="open", min_score=0) == ["c2"]
    page = await vault.list_contradictions(after=0, limit=1, state="open")
    assert (page.items, page.next) == ([found[1]], 5)
    assert (await vault.list_contradictions(after=5, limit=1, state="open")).next is None


async def test_contradictions_of_geoids(vault, samples):
    await _with_contradictions(vault, samples)
    assert [c.id for c in await vault.contradictions_of(["a"], state="open")] == ["c1", "c3"]
    assert [c.id for c in await vault.contradictions_of(["a", "c", "b"], state="open")] == ["c1", "c2", "c3"]
    assert await vault.contradictions_of(["a"], state="dissolved") == []
    assert await vault.contradictions_of([], state="open") == []


async def test_scars_page_and_weigh_and_move(vault, samples):
    scars = [
        samples.scar("s1", "c1", 1, weight=0.5),
        samples.scar("s2", "c2", 2, weight=0.25, vault="b", reason="it was so", decision="buffer"),
        samples.scar("s3", "c3", 3, weight=1.0),
    ]
    assert await vault.scar_weights() == (0.0, 0.0)
    await vault.commit(WriteBatch(entries=[samples.formed(s) for s in scars], scars=scars))
    page = await vault.list_scars(after=0, limit=2)
    assert (page.items, page.next) == (scars[:2], 2)
    assert (await vault.list_scars(after=2, limit=2)).items == scars[2:]
    assert await vault.scar_weights() == (1.5, 0.25)
    moved = samples.scar("s3", "c3", 3, weight=1.0, vault="b")
    await vault.commit(WriteBatch(scars=[moved]))
    assert await vault.scar_weights() == (0.5, 1.25)
    assert vault.head == 3


async def test_rows_that_share_an_offset_are_never_cut_by_a_page(vault, samples):
    scars = [samples.scar(f"s{i}", f"c{i}", offset) for i, offset in enumerate((1, 2, 2, 2, 3))]
    await vault.commit(WriteBatch(entries=[samples.formed(s) for s in (scars[0], scars[1], scars[4])], scars=scars))
    for limit in (1, 2, 3, 4, 9):
        seen, after = [], 0
        while after is not None:
            page = await vault.list_scars(after=after, limit=limit)
            seen += [scar.id for scar in page.items]
            after = page.next
        assert sorted(seen) == [f"s{i}" for i in range(5)]
