"""The command line against a real server: the same processes that a person would start."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kimera_stream.api.cli.console import explain
from kimera_stream.api.cli.main import app
from kimera_stream.client.http import HttpClient
from kimera_stream.protocol.errors import BadRequestError, KimeraError, NotFoundError
from kimera_stream.protocol.objects import GeoidBody

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("KIMERA_")},
    "KIMERA_EMBEDDING__PROVIDER": "hashing",
    "KIMERA_SCORING__VERIFIER": "off",
    "KIMERA_TELEMETRY__LOG_LEVEL": "error",
    "PYTHONUNBUFFERED": "1",
}
MAIN = [sys.executable, "-m", "kimera_stream.api.cli.main"]


class Server:
    """A server process with its data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*MAIN, "serve", "--port", str(self.port), "--data-dir", str(self.data_dir), "--env-file", ""],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found.group(1))
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("data"))
    running.start()
    yield running
    assert running.end(signal.SIGTERM) == 0


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def cli(server: Server, *arguments: str, given: str | None = None) -> Result:
    """Run a command inside this process, with the errors told as ``main`` tells them."""
    environment = {"KIMERA_CLIENT_URL": server.url, "KIMERA_PATHS__DATA_DIR": str(server.data_dir)}
    done = CliRunner().invoke(app, list(arguments), env=environment, input=given)
    if isinstance(done.exception, KimeraError):
        return Result(1, done.stdout, explain(done.exception))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


def process(server: Server, *arguments: str) -> Result:
    """Run a command as a process of its own."""
    environment = {**ENVIRONMENT, "KIMERA_CLIENT_URL": server.url}
    done = subprocess.run([*MAIN, *arguments], env=environment, capture_output=True, text=True, timeout=90, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def test_publishing_tailing_and_resolving(server: Server) -> None:
    first = cli(
        server, "publish", "Gate one, first round", "-s", "subject=gate-1", "-s", "state=open", "--agent", "guard"
    )
    assert first.code == 0, first.err
    assert "contradicts nothing" in first.out
    with subprocess.Popen(
        [*MAIN, "tail", "contradictions", "--since", "start", "--count", "1", "--json"],
        env={**ENVIRONMENT, "KIMERA_CLIENT_URL": server.url},
        stdout=subprocess.PIPE,
        text=True,
    ) as tail:
        second = cli(
            server,
            "publish",
            "-",
            "-s",
            "subject=gate-1",
            "-s",
            "state=closed",
            "--json",
            given="Gate one, second round\n",
        )
        assert second.code == 0, second.err
        assert tail.stdout is not None
        event = json.loads(tail.stdout.readline())
        assert tail.wait(20) == 0
    [found] = second.lines[0]["contradictions"]
    assert event["data"] == found
    assert "symbolic: state: 'open' vs 'closed'" in found["why"]
    resolved = cli(server, "resolve", found["id"], "collapse", "--reason", "looked at it", "--json")
    assert resolved.lines[0]["scar"]["reason"] == "looked at it"
    again = cli(server, "resolve", found["id"], "collapse")
    assert again.code == 1
    assert len(again.err.strip().splitlines()) == 1
    shown = cli(server, "tail", "contradictions", "scars", "--last", "1", "--count", "2")
    assert "resolved" in shown.out
    assert "looked at it" in shown.out


def test_searching_and_scoring(server: Server) -> None:
    cli(server, "publish", "The archive room is on the second floor.")
    hits = cli(server, "search", "archive room floor", "--json", "-k", "3").lines
    assert hits[0]["geoid"]["text"] == "The archive room is on the second floor."
    score = cli(server, "score", "The door is open.", "The door is not open.", "--json").lines[0]
    assert set(score) >= {"score", "components", "why"}


def test_errors_are_one_line(server: Server) -> None:
    for arguments, message in (
        (["publish", "x" * 9000], "text"),
        (["tail", "weather"], "channel"),
        (["search", "x", "--filter", '{"field": 1}'], "filter"),
        (["resolve", "none", "surge"], "none"),
    ):
        result = cli(server, *arguments)
        assert result.code == 1, arguments
        assert len(result.err.strip().splitlines()) == 1, result.err
        assert message in result.err
    told = process(server, "resolve", "none", "surge")
    assert (told.code, told.out) == (1, "")
    assert len(told.err.strip().splitlines()) == 1


def test_ingesting_several_formats(server: Server, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl.gz"
    rows = [{"premise": f"premise {n}", "hypothesis": f"hypothesis {n}", "label": "x"} for n in range(40)]
    pairs.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    summary = cli(server, "ingest", str(pairs), "--json").lines[-1]
    assert (summary["statements"], summary["rejected"], summary["lines"]) == (80, 0, 40)
    again = cli(server, "ingest", str(pairs), "--json")
    assert again.lines[-1]["statements"] == 0
    assert "going on after line 40" in again.err

    piped = cli(server, "ingest", "-", "--json", "--agent", "pipe", given="one plain line\n\nand another\n")
    assert piped.lines[-1]["statements"] == 2

    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "fine"}\n{"text": "cut sh\n{"text": "also fine"}\n{"text": "' + "y" * 9000 + '"}\n')
    result = cli(server, "ingest", str(mixed), "--json")
    assert result.code == 1
    assert result.lines[-1]["statements"] == 2
    assert [error["line"] for error in result.lines[-1]["errors"]] == [2, 4]


def test_a_file_that_grew_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("".join(f"note {n}\n" for n in range(10)))
    state = tmp_path / "state.json"
    assert cli(server, "ingest", str(notes), "--state", str(state), "--json").lines[-1]["statements"] == 10
    with notes.open("a") as file:
        file.write("note 10\n")
    assert cli(server, "ingest", str(notes), "--state", str(state), "--json").lines[-1]["statements"] == 1


def test_killing_server_and_client_loses_and_repeats_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    server.start()
    file = tmp_path / "facts.txt"
    file.write_text("".join(f"fact number {n} of the long list\n" for n in range(400)))
    environment = {**ENVIRONMENT, "KIMERA_CLIENT_URL": server.url}
    arguments = [*MAIN, "ingest", str(file), "--state", str(tmp_path / "state"), "--window", "32", "--json"]
    with HttpClient(server.url) as client:

        def until_committed(count: int) -> None:
            while client.position().offset < count:  # a small window, so the end is far from here
                assert ingest.poll() is None, "it ended before it could be killed"

        ingest = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_committed(50)
        server.end(signal.SIGKILL)
        server.start()
        until_committed(110)
        ingest.kill()
        ingest.wait(10)
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        versions: dict[str, int] = {}
        after: int | None = 0
        while after is not None:
            page = json.loads(client.request("GET", "/v1/geoids", params={"after": after, "limit": 200}))
            versions |= {item["text"]: item["version"] for item in page["items"]}
            after = page["next"]
    assert versions == {f"fact number {n} of the long list": 1 for n in range(400)}
    assert server.end(signal.SIGTERM) == 0
    checked = cli(server, "db", "check", "--json")
    assert checked.lines[0]["total_problems"] == 0


def test_database_commands(server: Server, tmp_path: Path) -> None:
    with HttpClient(server.url) as client:
        client.publish("Something worth keeping")
    export, copy = tmp_path / "all.jsonl.gz", tmp_path / "copy.sqlite3"
    fresh = f"sqlite+aiosqlite:///{tmp_path / 'fresh.sqlite3'}"
    here = f"sqlite+aiosqlite:///{server.data_dir / 'kimera.sqlite3'}"

    def db(command: str, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["db", command, *arguments, "--env-file", ""], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    [used] = [row for row in json.loads(db("usage", "--database", here, "--json")) if row["principal"] == "anonymous"]
    with HttpClient(server.url) as client:
        client.publish("One more, of six words")
        totals = json.loads(client.request("GET", "/v1/stats"))["totals"]
    assert totals["tokens_exact"] is True
    [now] = [row for row in json.loads(db("usage", "--database", here, "--json")) if row["principal"] == "anonymous"]
    grown = {name: now[name] - used[name] for name in ("statements", "text_bytes", "tokens", "bytes")}
    assert grown["statements"] == 1
    assert grown["text_bytes"] == grown["bytes"] == len("One more, of six words")
    assert grown["tokens"] > 0
    assert "anonymous" in db("usage", "--database", here)
    db("export", str(export), "--database", here)
    with pytest.raises(KimeraError, match="exists already"):
        db("export", str(export), "--database", here)
    db("import", str(export), "--database", fresh)
    assert "nothing is wrong" in db("check", "--database", fresh)
    db("backup", str(copy), "--database", here)
    report = json.loads(db("check", "--database", f"sqlite+aiosqlite:///{copy}", "--json"))
    assert report["total_problems"] == 0
    assert report["counts"]["geoid"] > 0
    with pytest.raises(KimeraError, match="stop every server"):
        db("new-epoch", "--database", here)
    assert f"it was {report['epoch']}" in db("new-epoch", "--database", f"sqlite+aiosqlite:///{copy}")
    assert "revision" in db("migrate", "--database", fresh)


def test_a_port_in_use_is_told(server: Server) -> None:
    done = subprocess.run(
        [*MAIN, "serve", "--port", str(server.port), "--data-dir", str(server.data_dir / "other"), "--env-file", ""],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "KIMERA_API__PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_plays_and_scores(server: Server) -> None:
    played = cli(server, "demo", "--url", server.url, "--fast", "--limit", "60")
    assert played.code == 0, played.err
    assert "60 statements of" in played.out
    assert re.search(r"precision \d\.\d\d .* recall \d\.\d\d", played.out)


def test_the_demo_starts_its_own_server() -> None:
    played = subprocess.run(
        [*MAIN, "demo", "--pace", "0.01", "--limit", "12", "--exit"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert played.returncode == 0, played.stderr
    assert "dashboard: http://127.0.0.1:" in played.stdout
    assert "recall" in played.stdout


def test_the_blocking_client(server: Server) -> None:
    with HttpClient(server.url) as client:
        assert client.ready()
        published = client.publish(GeoidBody(text="The kiosk sells maps."), key="k1")
        again = client.publish(GeoidBody(text="The kiosk sells maps."), key="k1")
        assert again.duplicate
        assert again.geoid.id == published.geoid.id
        assert client.geoid(published.geoid.id).text == "The kiosk sells maps."
        assert client.search("kiosk maps", k=1)[0].geoid.id == published.geoid.id
        items, _ = client.contradictions(limit=5)
        for item in items:
            assert client.contradiction(item.id).id == item.id
        assert client.score("a", "b").score >= 0
        assert "rates" in client.stats()
        assert client.health()["status"] == "ok"
        client.delete(published.geoid.id)
        with pytest.raises(NotFoundError):
            client.geoid(published.geoid.id)
        with pytest.raises(BadRequestError, match="text"):
            client.publish(GeoidBody())


def test_the_example_publishes(server: Server) -> None:
    example = Path(__file__).parents[2] / "examples" / "publish.py"
    done = subprocess.run(
        [sys.executable, str(example), server.url],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The maintenance window starts on Saturday at 22:00." in done.stdout
