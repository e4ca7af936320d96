"""The oracle with fixed seeds, short enough for every change. ``make chaos MINUTES=30`` is the long one."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.oracle.plan import DAMAGE, weights_of
from tests.oracle.processes import postgres_binaries
from tests.oracle.run import Config, run
from tests.oracle.shim import build_shim
from tests.oracle.tally import Tally

SEED = int(os.environ.get("KIMERA_TEST_ORACLE_SEED", "20261128"))


def told(config: Config) -> Tally:
    """Run it; the tally is shown with a test that fails."""

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")

    tally = run(config, say)
    say("\n".join(tally.lines()))
    return tally


def everybody_had_something_to_do(tally: Tally) -> None:
    """A run in which nothing happened proves nothing."""
    assert tally.outcomes["acked"] > 10 * sum(tally.faults.values())
    assert tally.outcomes["open"] == 0
    assert all(tally.heard[name] > 0 for name in tally.heard)
    assert tally.repeats > 0
    assert tally.resumes > sum(tally.faults.values())
    assert tally.found > 100
    assert tally.compared > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_is_kept_on_sqlite_whatever_happens(tmp_path: Path) -> None:
    tally = told(Config("sqlite", SEED, tmp_path, faults=32, rate=6.0, pause=0.1, scale=0.5))
    assert tally.violations == [], tally.replay
    assert tally.faults.total() == 32
    assert set(tally.faults) == set(weights_of("sqlite", shimmed=build_shim(tmp_path) is not None, damage=True))
    assert len(tally.damage) == sum(tally.faults[kind] for kind in DAMAGE)
    everybody_had_something_to_do(tally)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    postgres_binaries() is None, reason="the run starts a PostgreSQL of its own: its programs are not here"
)
def test_every_promise_is_kept_on_postgres_whatever_happens(tmp_path: Path) -> None:
    tally = told(Config("postgres", SEED, tmp_path, faults=18, rate=6.0, pause=0.1, scale=0.5))
    assert tally.violations == [], tally.replay
    assert tally.faults.total() == 18
    everybody_had_something_to_do(tally)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    postgres_binaries() is None or shutil.which("redis-server") is None,
    reason="the run starts a PostgreSQL and a Redis of its own: their programs are not here",
)
def test_every_promise_is_kept_by_two_edges_and_two_engines_whatever_happens(tmp_path: Path) -> None:
    kinds = ["cut", "kill", "pause", "stop", "redis_flush", "redis_restart", "redis_partition", "database_sessions"]
    tally = told(Config("cluster", SEED, tmp_path, faults=10, rate=4.0, pause=0.1, scale=0.5, kinds=frozenset(kinds)))
    assert tally.violations == [], tally.replay
    assert set(tally.faults) == set(kinds)
    everybody_had_something_to_do(tally)
