"""The command line without a server: reading files, typing filters, showing things, errors with a next step."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kimera_stream.api.cli import ingest_state
from kimera_stream.api.cli.clash import clash
from kimera_stream.api.cli.console import clean, explain
from kimera_stream.api.cli.filters import parse_filter, parse_since
from kimera_stream.api.cli.ingest_source import LineError, LineReader, Parser, head_digest
from kimera_stream.api.cli.ingest_state import IngestState
from kimera_stream.api.cli.main import app
from kimera_stream.api.cli.render import contradiction_text, event_text
from kimera_stream.protocol.errors import (
    BadRequestError,
    OverloadedError,
    UnauthorizedError,
    UnavailableError,
)
from kimera_stream.protocol.objects import Position

runner = CliRunner()


def run(*arguments: str, **environment: str) -> Any:
    return runner.invoke(app, list(arguments), env=environment or None)


# -- starting ---------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from kimera_stream.api.cli import main\n"
        "heavy = {'torch', 'numpy', 'sqlalchemy', 'starlette', 'httpx', 'websockets', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "main.app(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (
        "serve",
        "publish",
        "ingest",
        "tail",
        "resolve",
        "search",
        "demo",
        "config",
        "db",
        "dead-letters",
        "doctor",
    ):
        assert command in done.stdout


def test_the_server_loads_nothing_that_only_some_settings_need() -> None:
    code = (
        "import sys\n"
        "import kimera_stream.api.server\n"
        "heavy = {'torch', 'alembic', 'joserfc', 'cryptography', 'opentelemetry', 'httpx', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_error_is_one_line_with_a_next_step(unused_port: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kimera_stream.api.cli.main", "search", "x", "--url", f"http://127.0.0.1:{unused_port}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "kimera-stream serve" in done.stderr


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_each_error_says_what_to_do() -> None:
    assert "--token" in explain(UnauthorizedError("no token"))
    assert "--url" in explain(UnavailableError("cannot reach http://x"))
    assert "in 2 s" in explain(OverloadedError("too much", retry_after=2))
    assert explain(BadRequestError("geoid.text:\n  too long")) == "kimera-stream: geoid.text: too long"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish"], "give a statement"),
        (["publish", "x", "--symbol", "novalue"], "KEY=VALUE"),
        (["publish", "x", "--feature", "a=b"], "KEY=WEIGHT"),
        (["publish", "x", "--metadata", "[1]"], "JSON object"),
        (["resolve", "c", "perhaps"], "collapse, surge or buffer"),
        (["ingest", "f", "--format", "xml"], "jsonl or text"),
        (["search", "x", "--filter", "score is high"], "FIELD OP VALUE"),
        (["config", "new-key", "me", "--role", "king"], "publish, subscribe, resolve or admin"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


# -- settings and keys ------------------------------------------------------------------------------------------------


def test_config_check_and_show(tmp_path: Path) -> None:
    env = tmp_path / "env"
    env.write_text("KIMERA_API__PORT=9\nKIMERA_SECURITY__JWT_SECRET=0123456789abcdef0123456789abcdef\n")
    shown = run("config", "show", "--env-file", str(env))
    assert shown.exit_code == 0
    assert "KIMERA_API__PORT=9" in shown.output
    assert "0123456789abcdef" not in shown.output
    assert run("config", "check", "--env-file", str(env)).exit_code == 0
    env.write_text("KIMERA_API__PORT=many\n")
    checked = run("config", "check", "--env-file", str(env), "--json")
    assert checked.exit_code == 1
    problem = json.loads(checked.output.splitlines()[0])
    assert problem["variable"] == "KIMERA_API__PORT"
    assert problem["fatal"]


def test_client_settings_are_not_taken_for_the_servers(tmp_path: Path) -> None:
    checked = run("config", "check", "--env-file", "", KIMERA_CLIENT_URL="http://x", KIMERA_CLIENT_TOKEN="t")
    assert checked.exit_code == 0, checked.output


def test_a_new_key_is_shown_once_and_stored_hashed(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    made = run("config", "new-key", "ann", "-r", "publish", "-r", "resolve", "--days", "2", "--file", str(file))
    assert made.exit_code == 0, made.output
    token = next(line for line in made.output.splitlines() if line.startswith("kst_"))
    stored = json.loads(file.read_text())
    assert stored["principal"] == "ann"
    assert sorted(stored["roles"]) == ["publish", "resolve"]
    assert stored["expires"] - stored["created"] == 2 * 86_400
    assert token.rpartition("_")[2] not in file.read_text()


def test_the_reference_of_settings_is_printed() -> None:
    assert "KIMERA_API__PORT" in run("config", "docs").output


def test_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    result = run("doctor", "--quick", "--json", "--env-file", "", KIMERA_PATHS__DATA_DIR=str(blocker / "data"))
    findings = {line["name"]: line for line in map(json.loads, result.output.splitlines())}
    assert result.exit_code == 1
    assert findings["data"]["state"] == "error"
    assert "KIMERA_PATHS__DATA_DIR" in findings["data"]["next_step"]
    assert findings["python"]["state"] == "ok"
    good = run("doctor", "--quick", "--env-file", "", KIMERA_PATHS__DATA_DIR=str(tmp_path / "data"))
    assert good.exit_code == 0, good.output


# -- filters and positions --------------------------------------------------------------------------------------------


def test_filters_in_the_short_form() -> None:
    assert parse_filter("data.score>=0.8") == {"field": "data.score", "op": "gte", "value": 0.8}
    assert parse_filter('type = contradiction.found and data.state="open" and data.a_text~=pump') == {
        "all": [
            {"field": "type", "op": "eq", "value": "contradiction.found"},
            {"field": "data.state", "op": "eq", "value": "open"},
            {"field": "data.a_text", "op": "contains", "value": "pump"},
        ]
    }
    assert parse_filter('{"not": {"field": "type", "op": "exists"}}') == {"not": {"field": "type", "op": "exists"}}


def test_positions() -> None:
    assert parse_since("start", "e") == Position("e", 0)
    assert parse_since("12", "e") == Position("e", 12)
    assert parse_since("other:7", "e") == Position("other", 7)
    assert parse_since("my-cursor", "e") == "my-cursor"


# -- showing ----------------------------------------------------------------------------------------------------------


def marked(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("a", "b", "left", "right"),
    [
        ("The gate closes at six.", "The gate closes at 18:30.", ["six"], ["18:30"]),
        ("Valve V17 is closed.", "Valve V17 is wide open.", ["closed"], ["wide open"]),
        ("The pump starts by itself.", "The pump doesn't start by itself.", [], ["doesn't"]),
        ("same", "same", [], []),
    ],
)
def test_the_words_that_clash(a: str, b: str, left: list[str], right: list[str]) -> None:
    spans = clash(a, b)
    assert marked(a, spans[0]) == left
    assert marked(b, spans[1]) == right


@given(st.text(max_size=60), st.text(max_size=60))
def test_marks_lie_in_the_text_in_order(a: str, b: str) -> None:
    for text, spans in zip((a, b), clash(a, b), strict=True):
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(edges)
        assert all(0 <= edge <= len(text) for edge in edges)


@given(st.text(max_size=80))
def test_what_is_shown_cannot_control_the_terminal(text: str) -> None:
    assert clean(text).isprintable()


def test_a_contradiction_reads_well() -> None:
    data = {
        "id": "c1",
        "a": "g1",
        "b": "g2",
        "a_text": "The level is 3 m.\x1b[2J",
        "b_text": "The level is 5 m.",
        "score": 0.91,
        "why": ["number: 3 m vs 5 m"],
        "gradient_type": "semantic",
        "decision": "collapse",
        "state": "open",
    }
    text = contradiction_text(data, names={"g2": "gauge"}).plain
    assert "\x1b" not in text
    for part in ("0.91", "The level is 3 m.", "The level is 5 m.", "gauge", "number: 3 m vs 5 m", "collapse"):
        assert part in text
    event = {"type": "contradiction.dissolved", "ts": 0, "data": data}
    assert "dissolved" in event_text(event).plain


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("geoid.updated", {"id": "g", "symbolic_state": {"state": "open"}}, "state=open"),
        (
            "scar.formed",
            {"decision": "surge", "resolved_by": "ann", "reason": "why not", "contradiction_id": "c"},
            "why not",
        ),
        ("field.updated", {"entropy": 1, "temperature": 2, "activation": 0.5, "stability": 0.25}, "stability 0.250"),
        ("watch.matched", {"kind": "related", "score": 0.5, "watch": "w", "geoid": {"id": "g", "text": "hit"}}, "hit"),
        ("vault.rebalanced", {"moved": ["s1"]}, "s1"),
    ],
)
def test_every_kind_of_event_can_be_shown(kind: str, data: dict[str, Any], expected: str) -> None:
    assert expected in event_text({"type": kind, "ts": 0, "data": data}).plain


# -- files of statements ----------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[bytes]:
    reader = LineReader(str(path))
    found: list[bytes] = []
    try:
        while (lines := reader.read_lines()) is not None:
            found += lines
    finally:
        reader.close()
    return found


@given(st.lists(st.binary(max_size=50).filter(lambda line: b"\n" not in line), max_size=30), st.booleans())
def test_lines_come_out_as_they_went_in(tmp_path_factory: Any, lines: list[bytes], packed: bool) -> None:
    path = tmp_path_factory.mktemp("lines") / ("f.gz" if packed else "f")
    data = b"\n".join(lines) + (b"\n" if lines else b"")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert lines_of(path) == lines


def test_a_last_line_without_a_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one\ntwo")
    assert lines_of(path) == [b"one", b"two"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="missing"):
        LineReader(str(tmp_path / "missing"))
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"line\n" * 10_000)[:-20])
    with pytest.raises(BadRequestError, match=r"broken\.gz"):
        lines_of(broken)
    packed = bytearray(gzip.compress(b"".join(b"line %d\n" % number for number in range(10_000))))
    packed[len(packed) // 2] ^= 0xFF
    flipped = tmp_path / "flipped.gz"
    flipped.write_bytes(packed)
    with pytest.raises(BadRequestError, match=r"flipped\.gz"):
        lines_of(flipped)
    wide = tmp_path / "wide"
    wide.write_bytes(b"x" * (2 << 20))
    with pytest.raises(BadRequestError, match="longer than"):
        lines_of(wide)


def bodies(parser: Parser, *lines: str) -> list[dict[str, Any]]:
    return [json.loads(s.body) for number, line in enumerate(lines, 1) for s in parser.parse(number, line.encode())]


def texts(parser: Parser, *lines: str) -> list[Any]:
    return [body.get("text") for body in bodies(parser, *lines)]


def test_formats() -> None:
    assert texts(Parser("n"), "plain one", "", '{"not": "json here"}') == ["plain one", '{"not": "json here"}']
    assert texts(Parser("n"), '{"text": "a"}', '{"symbolic_state": {"k": 1}}') == ["a", None]
    assert texts(Parser("n"), '{"premise": "p", "hypothesis": "h", "label": "x"}') == ["p", "h"]
    assert texts(Parser("n", field="claim"), '{"claim": "c", "other": 1}') == ["c"]
    assert texts(Parser("n", format="text"), '{"text": "raw"}') == ['{"text": "raw"}']
    assert texts(Parser("n"), "\ufefffirst") == ["first"]
    body = bodies(Parser("n", agent="me", session="s"), '{"text": "a", "id": "mine", "originator_agent_id": "you"}')[0]
    assert (body["id"], body["originator_agent_id"], body["session_id"]) == ("mine", "you", "s")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "expected a JSON object"),
        ('{"metadata": ' + "[" * 5_000, "expected a JSON object"),
        ('{"sentence": "a"}', "--field"),
        ('{"text": "a", "label": 1}', "label"),
        ('{"text": 3}', "text"),
        ('{"premise": 1, "hypothesis": "h"}', "premise"),
    ],
)
def test_lines_that_are_no_statements_are_told(line: str, message: str) -> None:
    parser = Parser("n", format="jsonl")
    with pytest.raises(LineError, match=message):
        parser.parse(1, line.encode())
    with pytest.raises(LineError, match="UTF-8"):
        parser.parse(2, b"\xff\xfe")


def test_ids_depend_on_the_source_and_the_line_alone() -> None:
    first = Parser("facts.txt").parse(3, b"the same words")[0].id
    assert Parser("facts.txt").parse(3, b"the same words")[0].id == first
    others = {
        Parser("other.txt").parse(3, b"the same words")[0].id,
        Parser("facts.txt").parse(4, b"the same words")[0].id,
        Parser("facts.txt").parse(3, b"other words")[0].id,
    }
    assert len(others | {first}) == 4


# -- notes of an ingest -----------------------------------------------------------------------------------------------


def test_notes_are_kept_and_broken_ones_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    assert ingest_state.load(path) is None
    state = IngestState("http://x", "e", "/f", line=7, digest="d", digest_lines=7)
    ingest_state.save(path, state)
    assert ingest_state.load(path) == state
    path.write_text("{")
    assert ingest_state.load(path) is None


def test_a_grown_file_is_still_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("one\ntwo\n")
    before = head_digest(str(path), 2)
    with path.open("a") as file:
        file.write("three\n")
    assert head_digest(str(path), 2) == before
    path.write_text("one\n2\nthree\n")
    assert head_digest(str(path), 2) != before


def test_where_the_notes_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KIMERA_PATHS__DATA_DIR", str(tmp_path))
    one = ingest_state.default_path("f.txt", "http://a")
    assert one.parent == tmp_path / "ingest"
    assert one != ingest_state.default_path("f.txt", "http://b")
    assert os.sep not in one.name
