"""What the pair head's training may learn from, and what becomes of it."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # training is not installed with the package

from kimera_stream.engines.pair_head import EXTRAS, PairHead
from tests.engines.heads import card
from training.pair_head import material, network
from training.pair_head.again import CHANGES, FRAMES, Change, reworded
from training.verifier.clusters import KEPT_OUT, read_clusters
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, Example
from training.verifier.recipe import OWN_CORPUS, Materials
from training.verifier.stories import Story, read_stories

DIMENSION = 8


@pytest.fixture(scope="module")
def materials() -> Materials:
    """A part of everything."""
    clusters, stories = read_clusters([OWN_CORPUS]), read_stories(OWN_CORPUS / "stories")
    return Materials(Path(), None, 7, clusters[::15], stories[::15])


def plain_vector(text: str) -> np.ndarray:
    """One of eight directions, so that many statements look alike."""
    return np.eye(DIMENSION, dtype=np.float32)[len(text) % DIMENSION]


def test_nothing_of_a_statement_that_is_kept_for_measuring_is_learnt(
    materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "public", lambda materials: [])
    held = {cluster.anchor for cluster in materials.clusters if cluster.split != "train"}
    held |= {i.text for c in materials.clusters if c.source in KEPT_OUT for i in c.items}
    held |= {line for story in materials.stories if story.split != "train" for line in story.lines}
    own = {i.text for c in materials.clusters if c.split == "train" for i in c.items}
    own |= {line for story in materials.stories if story.split == "train" for line in story.lines}
    own |= {cluster.anchor for cluster in materials.clusters if cluster.split == "train"}
    chosen, shares = material.training_pairs(materials, _Vectors())
    assert {example.source for example in chosen} > {"story", "pool", "repeated", "fifth_numbers", "news"}
    assert not KEPT_OUT & {example.source for example in chosen}
    learnt = {text for example in chosen for text in (example.first, example.second)}
    assert len(learnt) > 5_000
    said = {text for e in chosen if e.source != "repeated" for text in (e.first, e.second)}
    assert said <= own
    assert all(e.first in own or e.second in own for e in chosen if e.source == "repeated")
    assert len(held - own) > 500
    assert not learnt & (held - own)
    assert shares.shape == (len(chosen),)
    assert (shares > 0).all()


class _Vectors(dict[str, np.ndarray]):
    def __missing__(self, text: str) -> np.ndarray:
        return plain_vector(text)


def test_public_pairs_are_learnt_from_training_premises_alone(
    materials: Materials, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(material, "public_examples", lambda *args: asked.append(args[1:]) or [])
    assert material.public(materials) == []
    assert asked == [("train", 7)]


def test_what_is_said_again_is_learnt_as_such_and_beside_what_contradicts_it(materials: Materials) -> None:
    found = material.repeated(materials)
    again = [e for e in found if e.kind == "repeated"]
    assert {e.label for e in again} == {ENTAILMENT}
    said = {e.second: e.first for e in again}
    beside = [e for e in found if e.kind == "beside"]
    assert sum(e.label == CONTRADICTION for e in beside) > 0.4 * len(beside) > 300
    labels = {(e.first, e.second): e.label for e in material.written(materials, "train")}
    assert all(labels[said[e.first], e.second] == e.label for e in beside)
    assert found == material.repeated(materials), "the vectors are encoded from one call, the pairs come from another"
    assert set(found) <= set(material.both_ways(materials))


def said_again(text: str, changes: tuple[Change, ...] = CHANGES) -> set[str]:
    return {reworded(random.Random(seed), text, changes) for seed in range(600)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lamp is on.", {"The lamp is still on.", "The lamp is on now.", "FYI: the lamp is on.", "Lamp on."}),
        ("The crate has been sold.", {"The crate was sold."}),
        ("He stopped smoking in 2015.", {"In 2015, he stopped smoking."}),
        ("On Friday, the shop opens late.", {"The shop opens late on Friday."}),
        ("The valve is not two metres long.", {"The valve isn't two metres long.", "The valve is not 2 metres long."}),
    ],
)
def test_a_statement_is_said_again_in_many_ways(text: str, expected: set[str]) -> None:
    assert expected <= said_again(text)


def test_what_tells_a_time_or_a_change_is_not_said_to_last() -> None:
    for text in ("The lamp is not on.", "The lamp was on and is off.", "The lamp is on until noon."):
        assert not [each for each in said_again(text) if re.search(r"\b(?:still|now|currently|at the moment)\b", each)]
    assert not [each for each in said_again("The lamp has been on since 9.") if " was " in each]
    assert not [each for each in said_again("The lamp is on.", FRAMES) if re.search(r"\bnow\b", each)]


def test_pairs_are_learnt_in_both_orders_with_the_findings_on_the_other_sides() -> None:
    vectors = {"The door of hall 3 is open.": np.eye(1, 8, 0, "f4")[0], "It is shut.": np.eye(1, 8, 1, "f4")[0]}
    pair, back = (Example(*texts, CONTRADICTION, "here", "") for texts in (list(vectors), list(vectors)[::-1]))
    table = network.Table.of([pair, pair], vectors, network.Read()).turned(slice(1))
    assert table.truth.tolist() == [True] * 3
    other = network.Table.of([back], vectors, network.Read())
    assert np.array_equal(table.features(np.array([2]))[:, :16], other.features(np.array([0]))[:, :16])
    assert table.vectors[table.older[2]].tolist() == vectors["It is shut."].tolist()
    sides = [EXTRAS.index("only_a"), EXTRAS.index("only_b")]
    assert table.extras[2, sides].tolist() == table.extras[0, sides[::-1]].tolist() == other.extras[0, sides].tolist()
    assert table.extras[0, sides[0]] != table.extras[0, sides[1]]


def test_strangers_are_near_of_another_world_and_name_nothing_in_common() -> None:
    pool = [
        (0, "the gate is open"),
        (0, "the gate is shut"),
        (1, "the door is open"),
        (2, "Rio has a gate"),
        (3, "Rio is hot"),
    ]
    vectors = {text: np.array([1, 0], np.float32) for _, text in pool}
    vectors["the door is open"] = np.array([0, 1], np.float32)
    found = {frozenset((e.first, e.second)) for e in material.strangers(pool, vectors, 7, asked=5, each=5)}
    assert found == {frozenset(("the gate is open", other)) for other in ("Rio has a gate", "Rio is hot")} | {
        frozenset(("the gate is shut", other)) for other in ("Rio has a gate", "Rio is hot")
    }


def test_a_fitted_head_says_on_the_server_what_it_said_in_training() -> None:
    """Trained on a rule that both vectors and words tell: it finds the rule, and the kernel gives the same logits."""
    rng = np.random.default_rng(1)
    texts = [f"The door {n} is {'open' if n % 2 else 'closed'}." for n in range(60)]
    vectors = dict(zip(texts, rng.standard_normal((60, DIMENSION)).astype("f4"), strict=True))
    vectors = {text: row / np.linalg.norm(row) for text, row in vectors.items()}
    examples = [
        Example(one, other, CONTRADICTION if ("open" in one) != ("open" in other) else ENTAILMENT, "story", "")
        for one in texts
        for other in texts
        if one != other
    ]
    table = network.Table.of(examples, vectors, network.Read())
    choice = network.Choice(hidden=4, epochs=3, batch=64)
    weights, quality = network.fit(table, np.ones(len(examples), np.float32), [table], choice, 7)
    assert quality > 0.98
    raw = network.logits(weights, table)
    head = PairHead(card(), weights)
    places = range(0, len(examples), 311)
    said = [
        head.probabilities(vectors[examples[i].second], vectors[examples[i].first][None], table.extras[i : i + 1])[0]
        for i in places
    ]
    assert said == pytest.approx([1 / (1 + np.exp(-raw[i])) for i in places], abs=1e-5)
    assert weights["w1"].astype(np.float16).astype(np.float32).tolist() == weights["w1"].tolist(), "as it ships"


def test_a_story_that_marks_a_pair_teaches_it() -> None:
    name = next(f"Feed {n} begins." for n in range(999) if Story("s", (f"Feed {n} begins.",), {}, "s").split == "train")
    story = Story("s", (name, "It is open.", "It is shut."), {(2, 1): CONTRADICTION}, "s")
    found = material.told(Materials(Path(), None, 7, [], [story]), "train")
    assert {(e.first, e.second): e.label for e in found}["It is open.", "It is shut."] == CONTRADICTION
    assert sum(e.label == NEUTRAL for e in found) == 2
