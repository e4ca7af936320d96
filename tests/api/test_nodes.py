"""What a process is made of follows from its settings: a single node of nothing that joins nodes, an edge of nothing that encodes."""

import subprocess
import sys

import pytest

LOADED = """
import sys
from kimera_stream.api.composition import build_services
from kimera_stream.infrastructure.settings import load_settings
from kimera_stream.streaming.hub import Hub
services = build_services(load_settings({environ!r}, None))
services.build()
print(" ".join(name for name in {names!r} if name in sys.modules) or "none of them")
"""
BUS = {"KIMERA_BUS__URL": "redis://127.0.0.1:1", "KIMERA_DATABASE__URL": "postgresql+asyncpg://127.0.0.1:1/none"}


def loaded(environ: dict[str, str], *names: str) -> str:
    script = LOADED.format(environ=environ, names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_a_single_node_loads_no_redis_client_and_nothing_of_several_nodes() -> None:
    assert loaded({}, "coredis", "kimera_stream.api.nodes", "kimera_stream.infrastructure.bus.redis") == "none of them"


@pytest.mark.parametrize("role", ["edge", "engine", "all"])
def test_every_role_is_composed_without_an_unmet_need(role: str) -> None:
    assert loaded({**BUS, "KIMERA_ROLE": role}, "coredis", "torch") == "coredis"
