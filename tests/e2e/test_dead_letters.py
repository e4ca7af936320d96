"""A real server that meets defects and outages: one statement's harm stays its own, nothing accepted is lost."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from kimera_stream.core.embedding import HashingProvider
from kimera_stream.core.interfaces import Matrix
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.errors import UnavailableError
from tests.e2e.conftest import RunProgram, StartServer
from tests.e2e.harness import Server, peer, until, web

pytestmark = pytest.mark.anyio

POISON = "A statement that nobody can digest."
QUICK = {"KIMERA_PERFORMANCE__RETRY_POLL": "0.05", "KIMERA_STREAM__STATS_INTERVAL": "0.05"}


@contextmanager
def encoder_with_a_defect(_services: Services, _settings: Settings) -> Iterator[None]:
    encode = HashingProvider.encode_counted

    async def encode_counted(self: HashingProvider, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        if POISON in texts:
            raise ZeroDivisionError("a defect put there by a test")
        return await encode(self, texts)

    HashingProvider.encode_counted = encode_counted  # type: ignore[method-assign]
    yield


@contextmanager
def planner_with_a_defect(_services: Services, _settings: Settings) -> Iterator[None]:
    look = CascadeEngine.look

    async def broken(self: CascadeEngine, fresh: Any, **how: Any) -> Any:
        if any(stored.geoid.text == POISON for stored in fresh):
            raise ZeroDivisionError("a defect put there by a test")
        return await look(self, fresh, **how)

    CascadeEngine.look = broken  # type: ignore[method-assign]
    yield


@contextmanager
def encoder_away(_services: Services, _settings: Settings) -> Iterator[None]:
    async def encode_counted(self: HashingProvider, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        raise UnavailableError("encoder: put out of order by a test")

    HashingProvider.encode_counted = encode_counted  # type: ignore[method-assign]
    yield


async def stats(server: Server, part: str) -> dict[str, Any]:
    async with web(server) as http:
        found: dict[str, Any] = (await http.get("/v1/stats")).json()[part]
    return found


def database(server: Server) -> list[str]:
    return ["--database", f"sqlite+aiosqlite:///{server.data_dir / 'kimera.sqlite3'}", "--env-file", ""]


@pytest.mark.parametrize("tamper", [encoder_with_a_defect, planner_with_a_defect], ids=["encoder", "planner"])
async def test_a_poisonous_statement_harms_only_itself_and_is_done_once_the_defect_is_mended(
    start_server: StartServer, run_program: RunProgram, tamper: Any
) -> None:
    server = start_server(tamper=tamper, **QUICK)
    async with peer(server) as client:
        for repetition in range(8):  # the service used to restart each time, and after five of them the process ended
            geoids = [{"text": POISON if n == 11 else f"Fact {n} of round {repetition}."} for n in range(24)]
            ids = [
                await client.send("publish", geoid=geoid, key=f"key-{repetition}-{n}") for n, geoid in enumerate(geoids)
            ]
            replies = [await client.reply(each) for each in ids]
            refused = [n for n, reply in enumerate(replies) if reply["op"] == "error"]
            assert refused == [11]
            assert replies[11]["code"] == "internal"
            assert "set aside" in replies[11]["message"]
            assert "put there" not in replies[11]["message"]

    async def set_aside() -> bool:
        return (await stats(server, "work"))["dead_letters"] == 8

    await until(set_aside)
    assert (await stats(server, "work"))["faults"] >= (8 if tamper is planner_with_a_defect else 0)
    async with web(server) as http:
        metrics = (await http.get("/metrics")).text
        ready = await http.get("/readyz")
    assert ready.status_code == 200
    assert 'kimera_dead_letters_total{code="internal"} 8.0' in metrics
    assert {record["event"] for record in server.errors()} <= {
        "a statement cannot be processed",
        "a text cannot be encoded",
    }
    server.terminate()
    assert server.wait() == 0

    listing = run_program("dead-letters", "list", "--json", *database(server))
    letters = json.loads(await listing.line(lambda line: line.startswith("[")))
    assert listing.wait() == 0
    assert [letter["key"] for letter in letters] == [f"key-{n}-11" for n in range(8)]
    assert {(letter["code"], letter["attempts"], letter["geoid"]["text"]) for letter in letters} == {
        ("internal", 1, POISON)
    }
    dropped = run_program("dead-letters", "drop", *[str(letter["id"]) for letter in letters[1:]], *database(server))
    await dropped.line(lambda line: line == "7 dead letters dropped")
    assert dropped.wait() == 0

    server = start_server(**QUICK)
    async with web(server) as http:
        before = (await http.get("/health")).json()["offset"]
    retried = run_program("dead-letters", "retry", "--all", *database(server))
    await retried.line(lambda line: line == "1 dead letter to be tried again")
    assert retried.wait() == 0

    async def published() -> bool:
        async with web(server) as http:
            return bool((await http.get("/health")).json()["offset"] > before)

    await until(published)
    async with peer(server) as client:
        again = await client.done("publish", geoid={"text": "Whatever."}, key="key-0-11")
        assert (again["duplicate"], again["geoid"]["text"]) == (True, POISON)
    empty = run_program("dead-letters", "list", *database(server))
    await empty.line(lambda line: line == "there are no dead letters")
    wrong = run_program("dead-letters", "retry", "4711", *database(server))
    await wrong.line(lambda line: line == "there is no dead letter 4711")
    assert wrong.wait() == 1


@contextmanager
def held(server: Server) -> Iterator[None]:
    """No commit gets through meanwhile: another program writes."""
    (file,) = server.data_dir.glob("*.sqlite3")
    holder = sqlite3.connect(file, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        yield
    finally:
        holder.close()


async def test_a_database_that_is_locked_for_a_while_is_not_noticed_by_those_who_wait(
    start_server: StartServer,
) -> None:
    server = start_server(KIMERA_DATABASE__BUSY_TIMEOUT="0.05", KIMERA_PERFORMANCE__RETRY_WITHIN="30", **QUICK)
    async with peer(server) as client:
        with held(server):
            ids = [await client.send("publish", geoid={"symbolic_state": {f"n{n}": 1}}) for n in range(20)]
            await client.done("ping")

            async def tried() -> bool:
                return (await stats(server, "work"))["retries"] >= 3

            await until(tried)
        replies = [await client.reply(each) for each in ids]
    assert [reply["offset"] for reply in replies] == list(range(1, 21))
    assert server.errors() == []


async def test_kept_work_outlives_failing_starts_and_is_counted(
    start_server: StartServer, run_program: RunProgram
) -> None:
    settings = {"KIMERA_PERFORMANCE__RETRY_WITHIN": "0", "KIMERA_PERFORMANCE__MAX_ATTEMPTS": "2", **QUICK}
    server = start_server(**settings)
    async with peer(server) as client:
        await client.publish(text="The first.")
    server.terminate()
    assert server.wait() == 0
    kept = sqlite3.connect(server.data_dir / "kimera.sqlite3")
    kept.execute("INSERT INTO checkpoint VALUES ('c', 'n', 1)")
    kept.execute(
        "INSERT INTO checkpoint_request (checkpoint_id, position, principal, session_id, idempotency_key, priority, "
        "attempts, merge, must_exist, accepted_at, body) VALUES ('c', 0, 'anonymous', NULL, 'k', 5, 0, 0, 0, 7, ?)",
        (b'{"text":"It was accepted."}',),
    )
    kept.commit()

    def attempts() -> list[int]:
        return [row[0] for row in kept.execute("SELECT attempts FROM checkpoint_request")]

    for number in (1, 2):
        server = start_server(tamper=encoder_away, **settings)
        await until(lambda n=number: attempts() in ([n], []))
        await server.line(lambda line: "kept work failed" in line or "set aside" in line)
        server.kill()
    assert attempts() == []
    kept.close()
    listing = run_program("dead-letters", "list", *database(server))
    line = await listing.line(lambda line: "unavailable" in line)
    assert "2 attempts" in line
    assert "encoder: put out of order by a test" in line
    retry = run_program("dead-letters", "retry", line.split()[0], *database(server))
    assert retry.wait() == 0
    server = start_server(**settings)  # nobody was running: the next start takes it up

    async def published() -> bool:
        async with web(server) as http:
            return bool((await http.get("/health")).json()["offset"] == 2)

    await until(published)


async def test_usage_is_told_and_conversations_are_remembered_over_a_restart(start_server: StartServer) -> None:
    server = start_server(**QUICK)
    async with peer(server) as client:
        for n in range(5):
            await client.publish(text=f"Statement {n}.", session_id=f"session-{n % 2}")
        await client.publish(session_id="session-1", vector=[1.0] + [0.0] * 383, metadata={"a": 1})
    server.terminate()
    assert server.wait() == 0
    server = start_server(**QUICK)

    async def remembered() -> bool:
        found = await stats(server, "sessions")
        return (found["sessions"], found["utterances"]) == (2, 6)

    await until(remembered)
    async with web(server) as http:
        report = (await http.get("/v1/usage", params={"days": 2})).json()
        none = (await http.get("/v1/usage", params={"principal": "nobody"})).json()
        wrong = await http.get("/v1/usage", params={"days": 0})
    (row,) = report["items"]
    assert (row["principal"], row["statements"], report["more"]) == ("anonymous", 6, False)
    assert row["text_bytes"] == 5 * len("Statement 0.")
    assert row["bytes"] == row["text_bytes"] + 4 * 384 + len('{"a":1}')
    assert row["tokens"] > 0
    assert none == {"items": [], "more": False}
    assert wrong.status_code == 400
