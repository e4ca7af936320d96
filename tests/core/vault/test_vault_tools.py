"""Check, export, import, backup."""

import gzip
import shutil
import sqlite3
from dataclasses import replace
from functools import partial

import msgspec
import pytest
from anyio import run_process
from sqlalchemy import null, text, update

from kimera_stream.core.interfaces import IdempotencyRecord, StoredGeoid, WriteBatch
from kimera_stream.core.kept import CheckpointRequest, DeadLetter
from kimera_stream.core.vault import checking_keys, requests, schema, tools
from kimera_stream.core.vault.errors import VaultFormatError, VaultSchemaError
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.database import Query
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.objects import Watch
from tests.postgres import own_database, url_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def filled(vault, samples):
    """A vault with one of everything, the beginning of its log trimmed."""
    batch = samples.publish(0, "a", "b", "c", session_id="s", semantic_state={"x": 0.1 + 0.2}, symbolic_state={"n": 1})
    batch.idempotency.append(IdempotencyRecord("ann", "k", b'{"ok":1}', 5))
    batch.audit.append((1, "ann", "publish", "a"))
    await vault.commit(batch)
    found = samples.contradiction("c1", "a", "b", 4, provisional=True)
    scar = samples.scar("s1", "c1", 5)
    await vault.commit(
        WriteBatch(entries=[samples.found(found), samples.formed(scar)], contradictions=[found], scars=[scar])
    )
    updated = samples.geoid("a", 6, version=2, text=None)
    await vault.commit(
        WriteBatch(
            entries=[
                samples.entry(6, updated, "geoid.updated"),
                samples.entry(7, samples.geoid("b", 2), "geoid.deleted"),
            ],
            geoids=[StoredGeoid(updated, None, "p")],
            deleted=[("b", 7)],
        )
    )
    await vault.save_watch(Watch(id="w", watch="n", principal="p", kinds=["related"], created_at=1), samples.vector(2))
    await vault.save_checkpoint([CheckpointRequest("ann", b'{"text":"t"}')])
    await vault.set_aside([DeadLetter(CheckpointRequest("ann", b'{"text":"x"}', key="k"), 5, "internal", "no")], most=9)
    await vault.record_encoder("minilm/1")
    await vault.trim(1)
    return vault


async def _change(vault, statement):
    query = Query(text(statement))
    await vault._database.write(lambda tx: tx.run(query))


async def _contents(vault):
    entries = (await vault.read(None, after=0, limit=99)).entries
    geoids = await vault.geoids(["a", "b", "c"])
    return {
        "ends": (vault.head, vault.trimmed, (await vault.retained()).payload_bytes, vault.encoder),
        "log": [(e.offset, e.type, e.ts, e.channels, bytes(e.data)) for e in entries],
        "geoids": {
            i: (s.geoid, s.principal, None if s.vector is None else s.vector.tobytes()) for i, s in geoids.items()
        },
        "contradictions": (await vault.list_contradictions(after=0, limit=9)).items,
        "scars": (await vault.list_scars(after=0, limit=9)).items,
        "watches": [(watch, None if v is None else v.tobytes()) for watch, v in await vault.watches()],
        "key": await vault.idempotent("ann", "k", not_before=0),
        "session": await vault.session("s"),
        "usage": await vault.usage(),
        "audit": await vault.audit(),
        "checkpoint": await vault.take_up(due=2**60, held_until=0, limit=9),
        "dead letters": [
            replace(each, id=0) for each in await vault._database.read(partial(requests.dead_letters, after=0, limit=9))
        ],
    }


async def test_a_sound_vault_passes_and_progress_is_told(filled, url):
    stages = []
    report = await tools.check(url, lambda stage, done, total: stages.append((stage, done, total)))
    assert (report.problems, report.ok) == ([], True)
    assert (report.epoch, report.head, report.trimmed, report.entries) == (filled.epoch, 7, 1, 6)
    assert report.first_results == 1
    assert report.counts == {"geoid": 2, "contradiction": 1, "scar": 1, "geoid_version": 5, "watch": 1}
    assert ("log", 6, 6) in stages
    assert stages[-1] == ("entities", 1, 1)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        ("UPDATE log_entry SET ts = ts + 1 WHERE \"offset\" = 3", "log entry 3 is damaged (checksum mismatch)"),
        ("DELETE FROM log_entry WHERE \"offset\" = 5", "log entry 5 is damaged (it is missing)"),
        ("DELETE FROM log_channel WHERE \"offset\" = 3 AND channel = 'geoids'", "missing in the index of channel geoids"),
        ("INSERT INTO log_channel (channel, \"offset\") VALUES ('agent:ghost', 4)", "the channel index has"),
        ("UPDATE geoid SET text = 'other' WHERE id = 'c'", "geoid c differs from log entry 3"),
        ("UPDATE geoid SET version = 9 WHERE id = 'c'", "geoid c differs from log entry 3"),
        ("UPDATE geoid SET metadata = '{\"x\": 1}' WHERE id = 'c'", "geoid c differs from log entry 3"),
        ("UPDATE geoid SET metadata = 'no json' WHERE id = 'c'", "geoid c cannot be read"),
        ("UPDATE semantic_feature SET weight = 0.5 WHERE geoid_id = 'c'", "geoid c differs from log entry 3"),
        ("UPDATE symbolic_feature SET value = '2' WHERE geoid_id = 'c'", "geoid c differs from log entry 3"),
        ("UPDATE contradiction SET score = 0.5", "contradiction c1 differs from log entry 4"),
        ("UPDATE scar SET reason = 'another'", "scar s1 differs from log entry 5"),
        ("DELETE FROM geoid WHERE id = 'c'", "geoid c lacks the version of log entry 3"),
        ("UPDATE geoid SET \"offset\" = 99 WHERE id = 'c'", "geoid c points at a log entry that is not there"),
        ("DELETE FROM contradiction", "contradiction c1 lacks the state of log entry 4"),
        ("DELETE FROM scar", "scar s1 lacks the state of log entry 5"),
        ("UPDATE scar SET \"offset\" = 88", "scar s1 points at a log entry that is not there"),
        ("DELETE FROM semantic_feature WHERE geoid_id = 'c'", "another number of semantic features"),
        ("DELETE FROM symbolic_feature WHERE geoid_id = 'c'", "another number of symbolic features"),
        ("UPDATE log_state SET payload_bytes = payload_bytes + 1", "its state says"),
        ("UPDATE idempotency_key SET created_at = 6", "the first result of key 'k' of 'ann' does not match"),
        ("UPDATE idempotency_key SET principal = 'bob'", "the first result of key 'k' of 'bob' does not match"),
        ("UPDATE idempotency_key SET checksum = checksum + 1", "the first result of key 'k' of 'ann' does not match"),
    ],
)  # fmt: skip
async def test_each_kind_of_damage_is_found(filled, url, damage, finding):
    await _change(filled, damage)
    report = await tools.check(url)
    assert not report.ok
    assert any(finding in problem for problem in report.problems), report.problems


async def test_first_results_are_verified_page_by_page(vault, url, monkeypatch):
    names = [(principal, f"k{n}") for principal in ("ann", "bob") for n in range(5)]
    await vault.commit(WriteBatch(idempotency=[IdempotencyRecord(*name, b'{"ok":1}', 5) for name in names]))
    monkeypatch.setattr(checking_keys, "_STEP", 3)
    assert (await tools.check(url)).first_results == 10
    keys = schema.idempotency_key
    for changed in (
        update(keys).where(keys.c.principal == "bob", keys.c.key == "k4").values(result=b'{"ok":2}'),
        update(keys).where(keys.c.principal == "ann", keys.c.key == "k2").values(checksum=null()),
    ):
        query = Query(changed)
        await vault._database.write(lambda tx, query=query: tx.run(query))
    stages = []
    report = await tools.check(url, lambda stage, done, total: stages.append((stage, done, total)))
    assert report.problems == ["the first result of key 'k4' of 'bob' does not match its checksum"]
    assert report.first_results == 9, "an earlier version has written one without a checksum"
    assert ("keys", 10, 10) in stages


async def test_a_deleted_geoid_that_is_still_there_is_found(filled, url, samples):
    geoid = samples.geoid("b", 2)
    await _change(
        filled,
        "INSERT INTO geoid (id, version, \"offset\", principal, entropy, created_at, updated_at, semantic_features, "
        f"symbolic_features, metadata) VALUES ('{geoid.id}', 1, 2, 'p', 0, 1, 1, 0, 0, '{{}}')",
    )  # fmt: skip
    report = await tools.check(url)
    assert any("geoid b is there though log entry 7 deleted it" in problem for problem in report.problems)


@pytest.fixture(params=["sqlite", pytest.param("own_postgres", marks=pytest.mark.postgres)])
def target(request, tmp_path):
    """A new database to import into: of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'target.sqlite3'}"
    return request.getfixturevalue("own_postgres_url")


async def test_export_and_import_keep_everything_under_a_new_epoch(filled, url, target, tmp_path, make_settings):
    dump = tmp_path / "dump.jsonl.gz"
    progress = []
    count = await tools.export(url, dump, lambda *step: progress.append(step))
    assert progress[-1] == ("export", count, count)
    assert await tools.import_(dump, target, lambda *step: progress.append(step)) == count
    assert progress[-1] == ("import", count, count)
    copy = SqlVault(target, make_settings())
    await copy.start()
    try:
        assert copy.epoch != filled.epoch
        assert await _contents(copy) == await _contents(filled)
        await copy.commit(WriteBatch(audit=[(9, "bob", "x", "y")]))  # numbers of rows go on
    finally:
        await copy.close()
    assert (await tools.check(target)).problems == []


async def test_import_refuses_a_vault_with_anything_in_it(filled, url, tmp_path):
    await tools.export(url, tmp_path / "dump.gz")
    with pytest.raises(VaultFormatError, match="not empty"):
        await tools.import_(tmp_path / "dump.gz", url)
    assert (await tools.check(url)).ok


def _edited(dump, change):
    with gzip.open(dump) as source:
        lines = source.read().splitlines(keepends=True)
    with gzip.open(dump, "wb") as out:
        out.writelines(change(lines))


def _set_version(lines):
    header = msgspec.json.decode(lines[0])
    header["version"] = 2
    return [msgspec.json.encode(header) + b"\n", *lines[1:]]


def _new_column(lines):
    header = msgspec.json.decode(lines[0])
    header["columns"]["geoid"].append("mood")
    return [msgspec.json.encode(header) + b"\n", *lines[1:]]


def _flip_log(lines):
    at = next(i for i, line in enumerate(lines) if b'"t":"log_entry"' in line)
    return [*lines[:at], lines[at].replace(b"geoid.created", b"geoid.updated"), *lines[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "ends early"),
        (lambda lines: lines[:3] + lines[4:], "expected .* rows, found"),
        (lambda lines: [*lines[:3], b"{not json\n", *lines[4:]], "line 4: not JSON"),
        (
            lambda lines: [*lines[:3], b'{"t":"nothing","r":[]}\n', *lines[4:]],
            "line 4: expected a row of a known table",
        ),
        (lambda lines: [*lines[:3], b'{"t":"geoid","r":[1]}\n', *lines[4:]], "line 4: expected 16 values"),
        (lambda lines: lines[1:], "line 1: expected the header"),
        (lambda lines: [], "line 1: expected the header"),
        (_set_version, "version 2: import it with the version"),
        (_new_column, "unknown columns geoid.mood"),
        (_flip_log, "checksum mismatch"),
    ],
)
async def test_a_file_that_is_not_a_whole_export_is_refused_and_nothing_is_imported(
    sqlite_vault, sqlite_url, samples, tmp_path, change, message, make_settings
):
    await sqlite_vault.commit(samples.publish(0, "a", "b", "c"))
    dump = tmp_path / "dump.gz"
    await tools.export(sqlite_url, dump)
    _edited(dump, change)
    target = f"sqlite:///{tmp_path / 'target.sqlite3'}"
    with pytest.raises(VaultFormatError, match=message):
        await tools.import_(dump, target)
    copy = SqlVault(target, make_settings())
    await copy.start()
    try:
        assert (copy.head, await copy.count_geoids()) == (0, 0)
    finally:
        await copy.close()


async def test_files_that_cannot_be_used_are_named(sqlite_vault, sqlite_url, tmp_path):
    (tmp_path / "there").write_bytes(b"")
    with pytest.raises(VaultFormatError, match="there exists already"):
        await tools.export(sqlite_url, tmp_path / "there")
    with pytest.raises(VaultFormatError, match="there exists already"):
        await tools.backup(sqlite_url, tmp_path / "there")
    with pytest.raises(VaultFormatError, match="no file"):
        await tools.import_(tmp_path / "missing", f"sqlite:///{tmp_path / 't.sqlite3'}")
    with pytest.raises(VaultFormatError, match="nowhere"):
        await tools.export(sqlite_url, tmp_path / "nowhere" / "dump.gz")
    (tmp_path / "plain").write_bytes(b"not gzipped")
    with pytest.raises(VaultFormatError, match="plain"):
        await tools.import_(tmp_path / "plain", f"sqlite:///{tmp_path / 't.sqlite3'}")


async def test_a_database_that_is_not_there_or_behind_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(BadRequestError, match="there is no database"):
        await tools.check(f"sqlite:///{tmp_path / 'missing.sqlite3'}")
    url = f"sqlite:///{tmp_path / 'old.sqlite3'}"
    await tools.migrate(url, "0001")
    with pytest.raises(VaultSchemaError, match="run `kimera-stream db migrate`"):
        await tools.check(url)


async def test_a_backup_of_a_vault_in_use_is_whole_and_has_its_own_epoch(
    sqlite_vault, sqlite_url, samples, tmp_path, make_settings
):
    await sqlite_vault.commit(samples.publish(0, "a", "b", text="x" * 2_000))
    progress = []
    await tools.backup(sqlite_url, tmp_path / "copy.sqlite3", lambda *step: progress.append(step))
    await sqlite_vault.commit(samples.publish(2, "c"))
    assert progress[-1][0] == "backup"
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy.sqlite3"]
    url = f"sqlite:///{tmp_path / 'copy.sqlite3'}"
    copy = SqlVault(url, make_settings())
    await copy.start()
    try:
        assert copy.epoch != sqlite_vault.epoch
        assert copy.head == 2
        assert (await copy.geoid("b")).geoid == (await sqlite_vault.geoid("b")).geoid
    finally:
        await copy.close()
    assert (await tools.check(url)).ok


@pytest.mark.postgres
async def test_a_backup_of_postgresql_is_refused_with_the_next_step(postgres_url, tmp_path):
    with pytest.raises(BadRequestError, match=r"pg_dump.*db new-epoch.*restored"):
        await tools.backup(postgres_url, tmp_path / "copy")


async def test_a_new_epoch_keeps_everything_but_positions(filled, url, make_settings):
    await filled.save_cursor("ann", "reader", "geoids", 5)
    await filled.close()
    before, now = await tools.new_epoch(url)
    assert before != now
    vault = SqlVault(url, make_settings())
    await vault.start()
    try:
        assert (before, vault.epoch, vault.head) == (filled.epoch, now, 7)
        assert await vault.cursor("ann", "reader", "geoids") is None
        assert (await vault.geoid("a")).geoid.version == 2
    finally:
        await vault.close()
    assert (await tools.check(url)).problems == []


async def test_no_new_epoch_while_anybody_has_the_database_open(vault, url, samples, make_settings):
    settings = make_settings(busy_timeout=0.1)
    with pytest.raises(BadRequestError, match="stop every server"):
        await tools.new_epoch(url, settings=settings)
    await vault.commit(samples.publish(0, "a"))  # nor is the server harmed by the question
    assert [e.offset for e in (await vault.read(None, after=0, limit=9)).entries] == [1]
    assert (await vault.retained()).epoch == vault.epoch
    await vault.close()
    assert (await tools.new_epoch(url, settings=settings))[0] == vault.epoch


async def test_a_new_epoch_needs_a_database(tmp_path):
    with pytest.raises(BadRequestError, match="there is no database"):
        await tools.new_epoch(f"sqlite:///{tmp_path / 'none.sqlite3'}")


@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("pg_restore") is None, reason="PostgreSQL's own programs are not here")
async def test_what_pg_dump_copied_is_another_log_after_a_new_epoch(
    postgres_vault, postgres_url, samples, tmp_path, make_settings
):
    """In the order that `db backup` names. Without the second step a reader of the one log would go on in the other."""
    await postgres_vault.commit(samples.publish(0, "a", "b"))
    dump = tmp_path / "dump"
    await run_process(
        ["pg_dump", "--format=custom", f"--file={dump}", f"--dbname={postgres_url.replace('+asyncpg', '')}"]
    )
    await postgres_vault.commit(samples.publish(2, "original"))
    with own_database() as name:
        url = url_of(name)
        await run_process(["pg_restore", "--no-owner", f"--dbname={url.replace('+asyncpg', '')}", str(dump)])
        before, now = await tools.new_epoch(url)
        assert before == postgres_vault.epoch, "a dump keeps the epoch: that is what the command is for"
        assert now != before
        restored = SqlVault(url, make_settings())
        await restored.start()
        try:
            await restored.commit(samples.publish(2, "copy"))
            assert (restored.epoch, restored.head) == (now, 3)
            assert (await restored.geoid("b")).geoid == (await postgres_vault.geoid("b")).geoid
        finally:
            await restored.close()
        assert (await tools.check(url)).problems == []
    assert (await postgres_vault.retained()).epoch == before


def test_the_template_is_wal(sqlite_template):
    """Readers never wait for the writer."""
    connection = sqlite3.connect(sqlite_template)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        connection.close()
