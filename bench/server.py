"""A real server process of its own for benches that look at it from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready, and the seconds that took by the wall clock."""

    process: subprocess.Popen[bytes]
    url: str
    seconds: float

    def stats(self) -> dict[str, Any]:
        """The newest value of ``stats``; the first one comes within a second."""
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while True:
                answer = client.get("/v1/stats")
                if answer.status_code == 200:
                    return dict(answer.json())
                time.sleep(0.1)  # noqa: TID251 - waits for another process

    def processor_seconds(self) -> float:
        """What it has used so far, all threads."""
        return processor_seconds(self.process.pid)


def processor_seconds(pid: int) -> float:
    """What a process has used so far, all threads."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(data_dir: Path, output: Path, **settings: str) -> Iterator[Running]:
    """A server on ``data_dir``, what it says in ``output``. Killed at the end if it still runs."""
    # An installed package comes with compiled modules; the first start here makes them.
    left_out = ("KIMERA_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    defaults = {"KIMERA_EMBEDDING__PROVIDER": "hashing", "KIMERA_SCORING__VERIFIER": "off"}
    told = {"KIMERA_TELEMETRY__LOG_FORMAT": "json", "KIMERA_PATHS__DATA_DIR": str(data_dir)}
    began = time.perf_counter()
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-X", f"pycache_prefix={output.parent / 'compiled'}", "-c", "from kimera_stream.api.cli.main import main; main()", "serve", "--port", "0", "--env-file", ""],
            stdout=file, stderr=subprocess.STDOUT, env=kept | defaults | told | settings,
        )  # fmt: skip
    try:
        url = _listening(process, output, began)
        yield Running(process, url, time.perf_counter() - began)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _listening(process: subprocess.Popen[bytes], output: Path, began: float) -> str:
    while time.perf_counter() - began < PATIENCE:
        for line in output.read_text(errors="replace").splitlines():
            if line.startswith("listening on "):
                return line.removeprefix("listening on ").strip()
        if process.poll() is not None:
            break
        time.sleep(0.01)  # noqa: TID251 - waits for another process
    raise RuntimeError("the server did not come up:\n" + output.read_text(errors="replace"))
