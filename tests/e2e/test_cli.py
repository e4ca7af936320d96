"""The command line against a real server: ingest that can be killed, tail that hears others, and the rest."""

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import RunProgram, StartServer
from tests.e2e.harness import PATIENCE, Server, environment, peer, show, until, web

pytestmark = pytest.mark.anyio


def statements(path: Path, count: int) -> None:
    """JSON lines; every third statement contradicts the one before it."""
    with path.open("w") as file:
        for n in range(count):
            state = {"subject": f"thing-{n - n % 3}", "value": n if n % 3 == 2 else n - n % 3}
            file.write(json.dumps({"symbolic_state": state, "metadata": {"line": n + 1}}) + "\n")


async def reached(server: Server, offset: int) -> bool:
    """Whether the log has come so far."""
    async with web(server) as http:
        return (await http.get("/health")).json()["offset"] >= offset


async def log_types(server: Server) -> list[str]:
    types: list[str] = []
    async with web(server) as http:
        since: dict[str, str] = {}
        while True:
            page = (await http.get("/v1/history", params={"channel": "geoids", "limit": 1000, **since})).json()
            types += [each["type"] for each in page["events"]]
            if not page["more"]:
                return types
            since = {"since": f"{page['epoch']}:{page['offset']}"}


async def test_a_killed_ingest_goes_on_and_repeats_nothing(
    start_server: StartServer, run_program: RunProgram, tmp_path: Path
) -> None:
    server = start_server()
    file, count = tmp_path / "many.jsonl", 900
    statements(file, count)
    arguments = ("ingest", str(file), "--json", "--window", "32", "--url", server.url)
    for threshold in (100, 300):
        program = run_program(*arguments)
        await until(partial(reached, server, threshold))
        assert not program.over, "it was done before it could be killed"
        program.kill()
        assert program.process.exitcode == -9
    last = run_program(*arguments)
    summary = json.loads(await last.line(lambda line: line.startswith("{")))
    assert last.wait() == 0
    assert summary["rejected"] == 0
    assert summary["statements"] <= count - 120, "it began at the first line again"
    assert await log_types(server) == ["geoid.created"] * count
    async with web(server) as http:

        async def all_found() -> bool:
            return (await http.get("/v1/field")).json()["open_contradictions"] == 2 * (count // 3)

        await until(all_found)
    once_more = run_program(*arguments)
    summary = json.loads(await once_more.line(lambda line: line.startswith("{")))
    assert (once_more.wait(), summary["statements"]) == (0, 0)


async def test_an_ingest_outlives_its_server(
    start_server: StartServer, run_program: RunProgram, tmp_path: Path
) -> None:
    server = start_server()
    port = int(server.address.rpartition(":")[2])
    file, count = tmp_path / "many.jsonl", 600
    statements(file, count)
    program = run_program("ingest", str(file), "--json", "--window", "32", "--url", server.url)
    await until(partial(reached, server, 100))
    server.kill()
    again = start_server(port=port)
    summary = json.loads(await program.line(lambda line: line.startswith("{")))
    assert program.wait() == 0
    assert summary["reconnects"] >= 1
    assert await log_types(again) == ["geoid.created"] * count


async def test_ingest_says_which_lines_it_could_not_read(
    server: Server, run_program: RunProgram, tmp_path: Path
) -> None:
    file = tmp_path / "mixed.jsonl.gz"
    with gzip.open(file, "wb") as out:
        out.write(b'{"text":"The first line is good."}\n{"text": \n\xff\n{"text":""}\n')
        out.write(b'{"premise":"A man sleeps.","hypothesis":"A man is awake."}')
    program = run_program("ingest", str(file), "--json", "--url", server.url)
    summary = json.loads(await program.line(lambda line: line.startswith("{")))
    assert program.wait() == 1
    assert (summary["statements"], summary["rejected"], summary["lines"]) == (3, 3, 5)
    assert [each["line"] for each in summary["errors"]] == [2, 3, 4]


async def test_tail_hears_what_a_second_client_publishes(server: Server, run_program: RunProgram) -> None:
    pretty = run_program("tail", "contradictions", "--count", "1", "--url", server.url)
    await pretty.line(lambda line: line.startswith("following contradictions"))
    exact = run_program("tail", "session:tailed", "--json", "--count", "4", "--since", "start", "--url", server.url)
    told = [
        run_program("publish", text, "--session", "tailed", "--url", server.url, "--json")
        for text in ("The east gate of the harbour is open.",)
    ]
    assert told[0].wait() == 0
    second = run_program(
        "publish", "The east gate of the harbour is not open.", "--session", "tailed", "--url", server.url
    )
    assert second.wait() == 0
    assert "The east gate of the harbour is open." in second.text
    assert pretty.wait() == 0
    assert "The east gate of the harbour is open." in pretty.text
    assert "The east gate of the harbour is not open." in pretty.text
    await exact.line(lambda line: '"contradiction.found"' in line)
    found = next(json.loads(line) for line in exact.lines if '"contradiction.found"' in line)
    resolve = run_program("resolve", found["data"]["id"], "collapse", "--reason", "looked", "--url", server.url)
    assert resolve.wait() == 0
    assert "scar" in resolve.text
    await until(lambda: len([line for line in exact.lines if line.startswith("{")]) == 4)
    assert exact.wait() == 0
    types = [json.loads(line)["type"] for line in exact.lines if line.startswith("{")]
    assert types == ["geoid.created", "geoid.created", "contradiction.found", "contradiction.resolved"]


async def test_search_and_errors_for_people(server: Server, run_program: RunProgram) -> None:
    async with peer(server) as client:
        await client.publish(text="Penguins breed on the southern shore.")
    search = run_program("search", "Penguins on the southern shore", "--url", server.url, "--json")
    assert search.wait() == 0
    assert "Penguins breed on the southern shore." in search.text
    nobody = run_program("publish", "x", "--url", "http://127.0.0.1:1")
    assert nobody.wait() == 1
    assert "kimera-stream serve" in nobody.text
    assert "Traceback" not in nobody.text
    wrong = run_program("resolve", "none", "collapse", "--url", server.url)
    assert wrong.wait() == 1
    assert "does not exist" in wrong.text


def test_the_console_script_serves(tmp_path: Path) -> None:
    """Not forked: the installed command, from the first import to the last line."""
    script = Path(sys.executable).with_name("kimera-stream")
    process = subprocess.Popen(
        [str(script), "serve", "--port", "0", "--data-dir", str(tmp_path / "data"), "--env-file", ""],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            show(line.rstrip())
            if line.startswith("listening on http://127.0.0.1:"):
                response = httpx.get(line.removeprefix("listening on ").strip() + "/readyz", timeout=PATIENCE)
                assert response.status_code == 200
                process.terminate()
    assert process.returncode == 0
