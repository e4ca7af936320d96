"""The oracle with fixed seeds, short enough for every change. ``make chaos MINUTES=30`` is the long one."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.oracle.faults import FAULTS
from tests.oracle.plan import DAMAGE, weights_of
from tests.oracle.processes import postgres_binaries
from tests.oracle.run import Config, run, steps
from tests.oracle.tally import Tally

SEED = int(os.environ.get("KIMERA_TEST_ORACLE_SEED", "20261128"))


KEEP = 200
"""Entries of the log that the run on PostgreSQL keeps."""
CLUSTER = [
    "cut", "kill", "pause", "stop", "revoke", "database_cut_off", "database_failover", "database_sessions", "redis_cut_off",
    "redis_flush", "redis_partition", "redis_pause", "redis_restart",
]  # fmt: skip
"""What several nodes alone have, and what befalls the nodes themselves; the rest befalls one server on PostgreSQL."""


def config_of(deployment: str, folder: Path) -> Config:
    """The run of each change."""
    if deployment == "sqlite":
        return Config("sqlite", SEED, folder, faults=32, rate=6.0, pause=0.1, scale=0.5)
    if deployment == "postgres":
        return Config("postgres", SEED, folder, faults=22, rate=6.0, pause=0.1, scale=0.5, keep=KEEP)
    return Config("cluster", SEED, folder, faults=13, rate=4.0, pause=0.1, scale=0.5, kinds=frozenset(CLUSTER))


def missing(*wanted: str) -> list[str]:
    """Programs that are not here."""
    here = {
        "gcc": shutil.which("gcc") or shutil.which("cc"),
        "redis-server": shutil.which("redis-server"),
        "postgres": postgres_binaries(),
    }
    return [name for name in wanted if here[name] is None]


def need(*wanted: str) -> None:
    """End the test where programs are missing: where changes are checked it fails, elsewhere it is skipped."""
    if lacking := missing(*wanted):
        said = f"the run needs programs that are not here: {', '.join(lacking)}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(said)
        pytest.skip(said)


def told(config: Config) -> Tally:
    """Run it; the tally is shown with a test that fails."""

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")

    tally = run(config, say)
    say("\n".join(tally.lines()))
    assert tally.violations == [], tally.replay
    assert tally.faults == Counter(step.kind for step in steps(config, shimmed=True))
    everybody_had_something_to_do(tally)
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
    assert tally.shown >= tally.faults["revoke"]


def test_the_runs_of_each_change_have_every_kind_of_fault(tmp_path: Path) -> None:
    done = {
        name: Counter(step.kind for step in steps(config_of(name, tmp_path), shimmed=True))
        for name in ("sqlite", "postgres", "cluster")
    }
    assert set().union(*done.values()) == FAULTS.keys() | DAMAGE.keys()
    assert done["sqlite"].keys() == weights_of("sqlite", shimmed=True, damage=True).keys()
    assert done["postgres"].keys() == weights_of("postgres", shimmed=True, damage=True).keys()
    assert done["cluster"].keys() == set(CLUSTER)
    assert done["sqlite"].total() >= 30


@pytest.mark.parametrize("name", ["gcc", "redis-server", "postgres"])
def test_a_program_that_is_missing_fails_where_changes_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys.modules[__name__], "postgres_binaries", lambda: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=name):
        need(name)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match=name):
        need(name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_is_kept_on_sqlite_whatever_happens(tmp_path: Path) -> None:
    need("gcc")
    tally = told(config_of("sqlite", tmp_path))
    assert len(tally.damage) == sum(tally.faults[kind] for kind in DAMAGE)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(600)
def test_every_promise_is_kept_on_postgres_whatever_happens(tmp_path: Path) -> None:
    need("gcc", "postgres")
    tally = told(config_of("postgres", tmp_path))
    assert tally.trimmed > 0  # somebody came back too late, and was told


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.timeout(600)
def test_every_promise_is_kept_by_two_edges_and_two_engines_whatever_happens(tmp_path: Path) -> None:
    need("gcc", "postgres", "redis-server")
    told(config_of("cluster", tmp_path))
