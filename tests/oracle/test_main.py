"""``python -m tests.oracle``, and ``make chaos`` that calls it: what they print and how they end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import __main__ as program
from tests.oracle.run import Config
from tests.oracle.tally import Tally

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tiny_run_prints_its_tally(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    asked = ["--seed", "3", "--faults", "1", "--only", "cut", "--pause", "0", "--rate", "3", "--slow", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle", *asked, "--folder", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0].startswith("oracle: sqlite, seed 3, ")
    assert lines[1] == "faults: 1 (cut 1)"
    assert [line.partition(":")[0] for line in lines[2:7]] == [
        "operations",
        "events checked",
        "resumes",
        "contradictions",
        "revoked tokens shown",
    ]
    assert lines[-1] == "verdict: every promise was kept"
    assert (folder / "server.txt").exists()


def test_a_broken_promise_ends_with_one_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Config] = []

    def broken(config: Config, *_: object, **__: object) -> Tally:
        asked.append(config)
        return Tally(config.seed, config.deployment, left_out=["clock"], violations=["entry 7 is not there"])

    monkeypatch.setattr(program, "run", broken)
    monkeypatch.setattr(
        sys, "argv", ["oracle", "--deployment", "cluster", "--seed", "9", "--minutes", "0.5", "--folder", str(tmp_path)]
    )
    assert program.main() == 1
    (config,) = asked
    assert (config.seed, config.seconds, config.faults, config.rate) == (9, 30.0, None, 4.0)
    lines = capsys.readouterr().out.splitlines()
    assert "VIOLATION: entry 7 is not there" in lines
    assert "left out, for want of a C compiler: clock" in lines
    assert lines[-1] == (
        "verdict: 1 violations; to replay: python -m tests.oracle --deployment cluster --seed 9 --faults 0"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["MINUTES=2"], "-m tests.oracle --deployment sqlite --minutes 2"),
        (["DEPLOYMENT=cluster", "SEED=7"], "-m tests.oracle --deployment cluster --minutes 30 --seed 7"),
    ],
)
def test_make_chaos_runs_it(given: list[str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "SEED")}
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "chaos", *given],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].strip().endswith(expected)
