"""The demo's feed is what it says it is, and the score is counted right."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from rich.console import Console

from kimera_stream.api.demo.feed import (
    CONTRADICTION_KINDS,
    NEAR_MISS_KINDS,
    FeedItem,
    labelled_pairs,
    load_feed,
    near_miss_pairs,
)
from kimera_stream.api.demo.runner import Findings
from kimera_stream.api.demo.scorecard import print_scorecard, score_pairs
from kimera_stream.api.demo.server import demo_environment, free_port
from kimera_stream.protocol.objects import RESERVED_SYMBOLS

FEED = load_feed()
BY_ID = {item.id: item for item in FEED}
ORDER = {item.id: number for number, item in enumerate(FEED)}


def test_it_is_large_and_varied_enough() -> None:
    contradictions = [item for item in FEED if item.contradicts]
    near_misses = [item for item in FEED if item.near_miss_of]
    assert len(FEED) >= 280
    assert len(contradictions) >= 65
    assert len(near_misses) >= 90
    stories = Counter(item.story for item in FEED)
    assert len(stories) >= 5
    assert min(stories.values()) >= 30
    for story in stories:
        assert len({item.source for item in FEED if item.story == story}) >= 4
    kinds = Counter(item.kind for item in contradictions)
    assert set(kinds) == set(CONTRADICTION_KINDS)
    assert min(kinds.values()) >= 5
    assert {item.kind for item in near_misses} == set(NEAR_MISS_KINDS)


def test_labels_refer_to_earlier_statements_of_the_same_story() -> None:
    assert len(BY_ID) == len(FEED)
    for item in FEED:
        assert not (item.contradicts and item.near_miss_of), item.id
        assert len(set(item.contradicts)) == len(item.contradicts)
        for other in [*item.contradicts, *([item.near_miss_of] if item.near_miss_of else [])]:
            assert ORDER[other] < ORDER[item.id], item.id
            assert BY_ID[other].story == item.story, item.id
        expected = CONTRADICTION_KINDS if item.contradicts else NEAR_MISS_KINDS if item.near_miss_of else (None,)
        assert item.kind in expected, item.id


def test_stories_are_interleaved() -> None:
    changes = sum(a.story != b.story for a, b in pairwise(FEED))
    assert changes > len(FEED) * 0.7


def test_every_statement_can_be_published_and_none_is_said_twice() -> None:
    for item in FEED:
        body = item.body("run1")
        assert body.text or body.symbolic_state
        assert re.fullmatch(r"[A-Za-z0-9_.~-]{1,128}", body.id or "")
        assert re.fullmatch(r"[A-Za-z0-9_.~-]{1,128}", body.session_id or "")
    texts = [re.sub(r"\W+", " ", item.text).casefold().strip() for item in FEED if item.text]
    assert len(set(texts)) == len(texts)


def symbolic_conflict(a: FeedItem, b: FeedItem) -> bool:
    one, two = a.symbolic_state or {}, b.symbolic_state or {}
    if one.get("subject") != two.get("subject") or one.get("as_of") != two.get("as_of") or not one or not two:
        return False
    return any(one[key] != two[key] for key in (one.keys() & two.keys()) - RESERVED_SYMBOLS)


def test_symbolic_labels_are_exactly_the_symbolic_conflicts() -> None:
    conflicts = {
        frozenset((a.id, b.id)) for a in FEED for b in FEED if ORDER[a.id] < ORDER[b.id] and symbolic_conflict(a, b)
    }
    assert conflicts == {pair for pair, kind in labelled_pairs(FEED).items() if kind == "symbolic"}


def test_the_labels_are_consistent_as_a_whole() -> None:
    """Two statements that say the same must contradict the same later ones."""
    labelled = labelled_pairs(FEED)
    for item in FEED:
        if item.near_miss_of is None or item.kind not in ("paraphrase", "unit_conversion"):
            continue
        twin = item.near_miss_of
        assert frozenset((item.id, twin)) not in labelled
        later = {other.id for other in FEED if ORDER[other.id] > ORDER[item.id]}
        mine = {other for other in later if frozenset((other, item.id)) in labelled}
        its = {other for other in later if frozenset((other, twin)) in labelled}
        assert mine == its, (item.id, twin)


def small_feed() -> list[FeedItem]:
    return [
        FeedItem(id="a", story="s", source="x", text="It is open."),
        FeedItem(id="b", story="s", source="x", text="The other one is shut.", near_miss_of="a", kind="other_entity"),
        FeedItem(id="c", story="s", source="x", text="It is shut.", contradicts=["a"], kind="antonym"),
        FeedItem(id="d", story="s", source="x", text="It is not open.", contradicts=["a"], kind="negation"),
    ]


def test_scores_are_counted_by_pair() -> None:
    feed = small_feed()
    reported = [frozenset("ac"), frozenset("ab"), frozenset("bd"), frozenset("ac")]
    card = score_pairs(feed, reported)
    assert card.right == {frozenset("ac"): "antonym"}
    assert card.missed == {frozenset("ad"): "negation"}
    assert card.false == {frozenset("ab"): "other_entity", frozenset("bd"): None}
    assert card.precision == pytest.approx(1 / 3)
    assert card.recall == pytest.approx(1 / 2)
    assert card.f1 == pytest.approx(0.4)
    assert near_miss_pairs(feed) == {frozenset("ab"): "other_entity"}


def test_an_empty_report_is_precise_and_finds_nothing() -> None:
    card = score_pairs(small_feed(), [])
    assert (card.precision, card.recall, card.f1) == (1.0, 0.0, 0.0)


def test_the_scorecard_lists_false_alarms_and_misses() -> None:
    console = Console(record=True, width=200, file=None, quiet=False)
    feed = small_feed()
    card = score_pairs(feed, [frozenset("ac"), frozenset("ab")])
    with console.capture() as capture:
        print_scorecard(console, card, feed, {frozenset("ab"): 0.77})
    text = capture.get()
    assert "0.77" in text
    assert "The other one is shut." in text
    assert "It is not open." in text
    assert "precision 0.50 (1 of 2 reported pairs are labelled)" in text
    assert "recall 0.50" in text


def test_a_dissolved_contradiction_no_longer_counts() -> None:
    findings = Findings(prefix="r-")
    data = {"id": "c1", "a": "r-a", "b": "r-c", "score": 0.9}
    findings.take("contradiction.found", data)
    assert set(findings.reported.values()) == {frozenset("ac")}
    findings.take("contradiction.dissolved", data)
    assert findings.reported == {}


def test_the_demos_server_is_embedded_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("KIMERA_DATABASE__URL", "postgresql+asyncpg://elsewhere/db")
    monkeypatch.setenv("KIMERA_ENVIRONMENT", "production")
    monkeypatch.setenv("KIMERA_EMBEDDING__PROVIDER", "hashing")
    environment = demo_environment(tmp_path, 0)
    assert "KIMERA_DATABASE__URL" not in environment
    assert environment["KIMERA_ENVIRONMENT"] == "development"
    assert environment["KIMERA_EMBEDDING__PROVIDER"] == "hashing"
    assert free_port() in (0, 8765)
