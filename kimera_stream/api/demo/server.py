"""A server of one's own for the demo: the same ``serve`` command, as a process with its own data directory."""

import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from kimera_stream.protocol.errors import UnavailableError

LISTENING = re.compile(r"listening on (https?://\S+)")
KEPT_GROUPS = ("KIMERA_EMBEDDING__", "KIMERA_SCORING__", "KIMERA_PERFORMANCE__", "KIMERA_STREAM__")
"""Settings of the caller's environment that the demo's server takes over: how it works, not where or for whom."""
STOP_DEADLINE = 20.0
PREFERRED_PORT = 8765


def demo_environment(data_dir: Path, port: int) -> dict[str, str]:
    """The environment of the demo's server: embedded defaults, open to this machine only."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KIMERA_") or name.startswith(KEPT_GROUPS)
    }
    return {
        **kept,
        "KIMERA_ENVIRONMENT": "development",
        "KIMERA_API__HOST": "127.0.0.1",
        "KIMERA_API__PORT": str(port),
        "KIMERA_PATHS__DATA_DIR": str(data_dir),
        "KIMERA_TELEMETRY__LOG_LEVEL": "warning",
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """The usual port if nobody uses it, else 0: any."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PREFERRED_PORT))
        except OSError:
            return 0
    return PREFERRED_PORT


@asynccontextmanager
async def running_server(
    data_dir: Path, *, on_line: Callable[[str], None], start_deadline: float = 300.0
) -> AsyncIterator[str]:
    """Start a server, wait until it listens, yield its URL, stop it at the end.

    Args:
        data_dir: Its data directory; its log goes to ``server.log`` there.
        on_line: Called with each line it prints while starting.
        start_deadline: Seconds it may take to start.

    Raises:
        UnavailableError: it ended or did not listen in time; the message has the end of its log.
    """
    log_path = data_dir / "server.log"
    with log_path.open("wb") as log:
        process = await anyio.open_process(
            [sys.executable, "-m", "kimera_stream.api.cli.main", "serve", "--env-file", ""],
            env=demo_environment(data_dir, free_port()),
            stdout=PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the server in order
        )
    try:
        url = await _until_listening(process, on_line, start_deadline)
        if url is None:
            tail = log_path.read_text(errors="replace").strip().splitlines()[-5:]
            raise UnavailableError("the demo's server did not start: " + (" / ".join(tail) or "it said nothing"))
        async with anyio.create_task_group() as group:
            group.start_soon(_drain, process)
            yield url
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def _until_listening(process: Process, on_line: Callable[[str], None], deadline: float) -> str | None:
    if process.stdout is None:
        return None
    rest = ""
    with anyio.move_on_after(deadline):
        async for chunk in TextReceiveStream(process.stdout, errors="replace"):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                found = LISTENING.search(line)
                if found:
                    return found.group(1)
                on_line(line)
    return None


async def _drain(process: Process) -> None:
    """Read on what the server prints, or it would block once the pipe is full."""
    if process.stdout is not None:
        async for _ in process.stdout:
            pass


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(STOP_DEADLINE):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    if process.stdout is not None:
        await process.stdout.aclose()
