"""The smallest runs of the programs of ``bench/`` that start a server or fill a database; their figures here say nothing.

Not here, as even their smallest run takes longer than a test may: ``bench.cluster`` and ``bench.takeover``, which start PostgreSQL, Redis
and up to five servers and wait for leases.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from bench import ingest, log, memory, quality, restart

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """Runs the program of a module with arguments; returns the object that it prints last, with its exit status as ``exited``."""

    def run(module: Any, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [module.__name__, "--json", *map(str, arguments)])
        exited = 0
        try:
            module.main()
        except SystemExit as end:
            exited = int(end.code or 0)
        return {**json.loads(capsys.readouterr().out.splitlines()[-1]), "exited": exited}

    yield run
    structlog.reset_defaults()  # a bench has its logs written where this test's output goes


def write_pairs(folder: Path, *names: str) -> None:
    """Sets of labelled pairs, each about its own things."""
    for name in names:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for n in range(4):
                said = {"premise": f"The {name} door {n} is open.", "hypothesis": f"The {name} door {n} is shut."}
                file.write(json.dumps({**said, "label": ("contradiction", "neutral")[n % 2]}) + "\n")


@pytest.mark.slow
def test_the_bench_of_the_log_compares_with_bare_loops_and_replays(bench: Bench, tmp_path: Path) -> None:
    small = ["--rounds", 1, "--seconds", 0.01, "--entries", 600, "--served", 600, "--no-postgres"]
    printed = bench(log, "--folder", tmp_path, *small)
    assert list(printed) == ["sqlite_version", "synchronous", "sqlite", "served", "exited"]
    commit = printed["sqlite"]["commit"]
    for size in ("1", "32", "512"):
        assert min(commit[size]["vault_per_s"], commit[size]["bare_per_s"], commit[size]["ratio"]) > 0
    assert commit["batched_over_single"] > 0
    replay = printed["sqlite"]["replay"]
    assert replay["entries"] == printed["served"]["entries"] == 600
    assert min(replay["log_per_s"], replay["channel_per_s"], replay["page_under_load_ms"]) > 0
    assert printed["served"]["per_s"] >= printed["served"]["median_per_s"] > 0
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.slow
@pytest.mark.timeout(300)  # five starts of a server
def test_the_bench_of_restarts_times_each_kind_of_start(bench: Bench) -> None:
    printed = bench(restart, "--entries", 600, "--geoids", 100, "--tail", 50, "--rounds", 1)
    assert (printed["entries"], printed["geoids"], printed["with_tail"]["tail"]) == (600, 100, 50)
    assert printed["snapshot_bytes"] > 0
    for kind in ("without_snapshot", "with_snapshot", "graceful_stop", "with_tail"):
        assert printed[kind]["seconds"] > 0
        assert printed[kind]["stopped_in"] >= 0


@pytest.mark.slow
def test_the_bench_of_ingest_counts_what_was_committed(bench: Bench, tmp_path: Path) -> None:
    write_pairs(tmp_path, *ingest.SOURCES)
    small = ["--modes", "hashing_rules", "--statements", 20, "--geoids", 0, "--starts", 0, "--no-encoder"]
    printed = bench(ingest, "--data", tmp_path, *small)
    assert list(printed) == ["processors", "load_at_start", "hashing_rules", "exited"]
    found = printed["hashing_rules"]
    assert (found["stored_before"], found["statements"], found["committed"]) == (0, 20, 20)
    assert found["per_second"] > 0
    assert len(found["per_second_by_part"]) == 4
    assert min(found["resident_mb"]) > 10


@pytest.mark.slow
def test_the_bench_of_quality_judges_every_set(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, *quality.MEASURED, *quality.FILLERS)
    stories = [story for story in quality.read_stories(quality.OWN_CORPUS / "stories") if story.split == "test"][:1]
    monkeypatch.setattr(quality, "read_stories", lambda _: stories)
    small = ["--verifier", "off", "--pairs", 4, "--clusters", 3, "--fillers", 10]
    printed = bench(quality, "--data", tmp_path, *small)
    assert {"model", "threshold_balanced", "pairs", "families", "pool", "stories"} < set(printed)
    assert printed["encoded_per_second"] > 0
    assert set(printed["pairs"]) == {"corpus", "snli_dev", *quality.MEASURED}  # of SNLI premises that nobody trained on
    for name in quality.MEASURED:
        assert printed["pairs"][name]["n"] == 4
        assert 0 <= printed["pairs"][name]["auc"] <= 1
        assert set(printed["pairs"][name]["balanced"]) == {"precision", "recall", "f1"}
    assert printed["pool"]["stored"] == 13
    assert printed["pool"]["published"] == printed["pairs"]["corpus"]["n"] > 0
    assert (printed["stories"]["stories"], printed["stories"]["published"]) == (1, len(stories[0].lines))


@pytest.mark.slow
def test_the_bench_of_memory_says_whether_it_grew_and_exits_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "SAMPLE_EVERY", 0.1)
    monkeypatch.setattr(memory, "SETTLE", 1.0)
    monkeypatch.setattr(memory, "NOISE", -1e9)  # so that whatever it does in these seconds is growth
    printed = bench(memory, "--minutes", 0.1, "--warm-up", 0, "--rate", 20, "--folder", tmp_path)
    if printed["rss_slope_error"] is None:  # on a machine so slow that there were too few samples
        assert (printed["rss_slope_within_noise"], printed["exited"]) == (None, memory.TOO_SHORT)
    else:
        assert printed["rss_slope_error"] > 0
        assert printed["own_slope_within_noise"] is False
        assert (printed["rss_slope_within_noise"], printed["exited"]) == (False, memory.GROWS)
    assert printed["done"]["published"] > 0
    assert printed["publishes_per_second"] > 0
    assert printed["after"]["rss"] > 10_000_000
    assert printed["tables"]["last"]["geoid"] >= 0
    assert (printed["errors_logged"], printed["leak_reports"], printed["exit_code"]) == (0, [], 0)


def samples(grows_by: float, count: int) -> list[memory.Sample]:
    """One every 5 s, of a process that grows by so many bytes a minute under a noise of a megabyte."""
    made = []
    for n in range(count):
        rss = int(1e8 + grows_by * n / 12 + 1e6 * (n * 7919 % 11 - 5) / 5)
        made.append(memory.Sample(5.0 * n, rss, 0, *[0] * 6, caches={}))
    return made


@pytest.mark.parametrize(
    ("grows_by", "count", "within", "status"),
    [
        (0.0, 120, True, memory.FLAT),
        (-1e6, 120, True, memory.FLAT),
        (1e6, 120, False, memory.GROWS),
        (1e6, 23, None, memory.TOO_SHORT),
    ],
)
def test_growth_beyond_the_noise_fails_the_bench_of_memory(
    grows_by: float, count: int, within: bool | None, status: int
) -> None:
    found = memory.slope(samples(grows_by, count), lambda each: each.rss)
    assert memory.within_noise(found) is within
    assert memory.status({"rss_slope_within_noise": memory.within_noise(found)}) == status
