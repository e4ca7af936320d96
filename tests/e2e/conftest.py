"""Servers for end-to-end tests. Their output is shown with the test that fails; they are always stopped."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.harness import Program, Server, show, web
from tests.postgres import own_database

StartServer = Callable[..., Server]
RunProgram = Callable[..., Program]


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(
        tmp_path_factory.mktemp("shared") / "data",
        KIMERA_STREAM__STATS_INTERVAL="0.2",
        KIMERA_STREAM__FIELD_INTERVAL="0.1",
        KIMERA_API__COMMANDS_BURST="5000",
    )
    yield made
    made.stop()


@pytest.fixture
def server(_shared: Server) -> Iterator[Server]:
    """A server that many tests use; each with ids and subjects of its own."""
    before = len(_shared.lines)
    assert not _shared.over, "an earlier test has ended the shared server:\n" + "\n".join(_shared.lines)
    yield _shared
    show(*_shared.lines[before:])


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of the test's own, by default on one data directory: the next one is a restart."""
    made: list[Server] = []

    def start(data_dir: Path | None = None, **options: object) -> Server:
        server = Server(data_dir or tmp_path / "data", **options)  # type: ignore[arg-type]
        made.append(server)
        return server

    yield start
    for number, server in enumerate(made):
        server.stop()
        show(f"--- server {number}, exit code {server.process.exitcode}", server.text)


@pytest.fixture
def database() -> Iterator[str]:
    """The name of an empty PostgreSQL database of the test's own."""
    with own_database() as name:
        yield name


@pytest.fixture
def run_program(tmp_path: Path) -> Iterator[RunProgram]:
    """Starts ``kimera-stream`` with arguments, in the test's directory."""
    made: list[Program] = []

    def run(*arguments: str, **settings: str) -> Program:
        program = Program(*arguments, directory=tmp_path, **settings)
        made.append(program)
        return program

    yield run
    for number, program in enumerate(made):
        program.stop()
        show(f"--- program {number}, exit code {program.process.exitcode}", program.text)


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with web(server) as client:
        yield client
