"""What the training rests on: labels, splits and figures. No training is run here."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))  # training is not installed with the package

from training.verifier import __main__ as training_main
from training.verifier import (
    recipe,
    templates_states,
    templates_updates,
    templates_values,
    vocabulary,
    vocabulary_updates,
)
from training.verifier.clusters import (
    KEPT_OUT,
    Cluster,
    Item,
    anchor_examples,
    either_way,
    read_clusters,
    training_examples,
    turned,
)
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, NOT_CONTRADICTION, Example, Split, split_of
from training.verifier.frames import Group, read_frames
from training.verifier.generators import GENERATORS, generated_clusters
from training.verifier.loop import Stage, batches
from training.verifier.measure import calibration_error, decide, fit_calibration, operating_points, roc_auc
from training.verifier.mining import named
from training.verifier.recipe import OWN_CORPUS
from training.verifier.stories import Story, read_stories, story_examples, training_pairs
from training.verifier.templates_values import spell
from training.verifier.wordnet import read_adjectives, substituted_clusters


@pytest.fixture(scope="module")
def clusters() -> list[Cluster]:
    return read_clusters([OWN_CORPUS])


def test_the_corpus_is_whole_and_contrastive(clusters: list[Cluster]) -> None:
    assert len(clusters) >= 15_000
    labels = [item.label for cluster in clusters for item in cluster.items]
    for label in (CONTRADICTION, ENTAILMENT, NEUTRAL):
        assert labels.count(label) > len(labels) * 0.15
    for cluster in clusters:
        assert cluster.anchor.strip()
        assert all(item.text.strip() and item.kind for item in cluster.items)


def test_no_item_is_both_a_contradiction_and_not_one(clusters: list[Cluster]) -> None:
    for cluster in clusters:
        seen: dict[str, bool] = {}
        for item in cluster.items:
            clashes = item.label == CONTRADICTION
            assert seen.setdefault(item.text.lower(), clashes) == clashes, (cluster.anchor, item.text)


def test_neither_order_nor_seed_moves_a_split(clusters: list[Cluster]) -> None:
    hashed = [cluster for cluster in clusters if cluster.source not in KEPT_OUT]
    shares = [sum(c.split == name for c in hashed) / len(hashed) for name in ("train", "dev", "test")]
    assert shares == pytest.approx([0.85, 0.06, 0.09], abs=0.02)
    assert {c.split for c in clusters if c.source in KEPT_OUT} == {"test"}
    assert split_of(" Truck 14 left. ") == split_of("truck 14 left.")


def test_what_is_trained_never_meets_what_is_measured(clusters: list[Cluster]) -> None:
    held = {c.anchor for c in clusters if c.split != "train"}
    trained = training_examples([c for c in clusters if c.split == "train"], 7)
    assert not held & {text for e in trained for text in (e.first, e.second)}


def _words_kept() -> set[str]:
    """Every entry of every split list that is for measuring."""
    kept: set[str] = set()

    def add(entry: object) -> None:
        if isinstance(entry, str):
            kept.add(entry.replace("{x}", "").strip().lower())
        else:
            assert isinstance(entry, tuple | list)
            for each in entry:
                add(each)

    apart = {"OPPOSITES", "COUNTED", "TIMED", "MEASURED"}
    lists: list[list[object]] = [
        value
        for module in (vocabulary, vocabulary_updates)
        for name, value in vars(module).items()
        if isinstance(value, list) and name not in apart
    ]
    lists += [*map(list, vocabulary.SUBJECTS.values()), *map(list, templates_values.AMOUNTS.values())]
    lists.append(list(templates_values.DURATIONS))
    for words in lists:
        add(vocabulary.part(words, "test"))
    add([(pair.one, pair.other) for pair in vocabulary.OPPOSITES if pair.split == "test"])
    # Of these lists the verbs and the kinds of measure are common to both parts.
    add([(what, does) for what, _, does in vocabulary.part(vocabulary.COUNTED, "test")])
    add([(what, tail) for what, _, tail in vocabulary.part(vocabulary.TIMED, "test")])
    add([what for what, _, _ in vocabulary.part(vocabulary.MEASURED, "test")])
    return {word for word in kept - COMMON if not re.fullmatch(r"\d+ (minutes|hours|days)", word)}


COMMON = {"", "is", "was", "be"}
"""Words and, above, numbers of the lists that no part could do without."""


def test_no_word_kept_for_measuring_is_trained_on() -> None:
    kept = _words_kept()
    assert len(kept) > 300
    trained = "\n".join(
        text.lower()
        for cluster in (c for seed in (7, 8) for c in generated_clusters("train", seed))
        for text in (cluster.anchor, *(item.text for item in cluster.items))
    )
    found = {w for w in kept if w in trained and re.search(rf"(?<![\w.,]){re.escape(w)}(?!\w)", trained)}
    assert not found
    measured = " ".join(item.text for c in generated_clusters("test", 7) for item in c.items).lower()
    assert sum(word in measured for word in kept) > 0.8 * len(kept)


def test_no_frame_kept_for_measuring_is_trained_on() -> None:
    groups = [
        group
        for module in (templates_states, templates_updates, templates_values)
        for value in vars(module).values()
        if isinstance(value, tuple) and value and isinstance(value[0], Group)
        for group in value
    ]
    assert len(groups) > 100
    slot = re.compile(r"\{\w+\}")
    trained = {slot.sub("_", frame).lower() for group in groups for frame in group.train}
    for kept in {frame for group in groups for frame in group.test}:
        form = re.compile(".+".join(map(re.escape, slot.split(kept.lower()))))
        assert not [frame for frame in trained if form.fullmatch(frame)], kept


def test_templates_measure_with_every_generator() -> None:
    train, test = generated_clusters("train", 7, share=0.3), generated_clusters("test", 7, share=0.3)
    assert {c.source for c in train} == {c.source for c in test} == {f"generated-{name}" for name in GENERATORS}
    assert not {c.anchor.lower() for c in train} & {c.anchor.lower() for c in test}


def test_a_group_without_frames_for_measuring_is_refused() -> None:
    with pytest.raises(ValueError, match="frames for training and for measuring"):
        read_frames("C antonym:\n{x} is {anti}")
    with pytest.raises(ValueError, match="no group is open"):
        read_frames("{x} is {anti}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_update_contradicts_only_where_it_says_otherwise(split: Split) -> None:
    """What opens alike replaces, confirms or speaks of another thing, so that the opening gives nothing away."""
    told: dict[str, set[tuple[int, str]]] = {}
    for cluster in generated_clusters(split, 5):
        if cluster.source == "generated-superseded":
            for item in cluster.items:
                told.setdefault(item.text.lower().split(maxsplit=1)[0], set()).add((item.label, item.kind))
    for opening in ("update:", "correction:") if split == "train" else ("erratum:", "revised", "new"):
        assert {(CONTRADICTION, "correction"), (NEUTRAL, "entity")} <= told[opening], opening
        assert ENTAILMENT in {label for label, _ in told[opening]}, opening


def test_no_form_of_negation_or_of_a_state_gives_its_label_away() -> None:
    forms = ("not only", " because ", "no longer than", "not all", "no longer ", "not even", "=", "->", " is not ")
    told: dict[str, set[bool]] = {form: set() for form in forms}
    for cluster in generated_clusters("train", 5):
        for item in cluster.items:
            for form in forms:
                if form in item.text.lower():
                    told[form].add(item.label == CONTRADICTION)
    assert told == {form: {True, False} for form in forms}


def test_every_generated_cluster_has_both_sides() -> None:
    for cluster in generated_clusters("train", 3, share=0.2):
        labels = {item.label for item in cluster.items}
        assert CONTRADICTION in labels, cluster
        assert labels - {CONTRADICTION}, cluster
        assert len({item.text for item in cluster.items}) == len(cluster.items)


def test_turning_a_pair_keeps_what_is_known() -> None:
    pair = Example("a", "b", CONTRADICTION, "s", "k")
    assert turned(pair) == Example("b", "a", CONTRADICTION, "s", "k")
    assert turned(Example("a", "b", ENTAILMENT, "s", "k")).label == NOT_CONTRADICTION


def test_only_what_means_the_same_stands_for_the_anchor() -> None:
    items = (
        Item("the gate is shut now", ENTAILMENT, "paraphrase"),
        Item("some gate is shut", ENTAILMENT, "general"),
        Item("the gate is open", CONTRADICTION, "antonym"),
    )
    examples = training_examples([Cluster("the gate is shut", items, "x")], 1)
    against = {frozenset((e.first, e.second)) for e in examples if e.label == CONTRADICTION}
    assert frozenset(("the gate is shut now", "the gate is open")) in against
    assert frozenset(("some gate is shut", "the gate is open")) not in against
    assert [e.label for e in anchor_examples([Cluster("the gate is shut", items, "x")])] == [1, 1, 0]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[bool, int]]) -> None:
    truth = np.array([t for t, _ in rows])
    scores = np.array([float(s) for _, s in rows])
    wins = [(p > n) + 0.5 * (p == n) for p in scores[truth] for n in scores[~truth]]
    if wins:
        assert roc_auc(truth, scores) == pytest.approx(np.mean(wins))
    else:
        assert np.isnan(roc_auc(truth, scores))


def test_calibration_finds_the_curve_that_made_the_labels() -> None:
    rng = np.random.default_rng(5)
    margins = rng.normal(0, 3, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-(0.6 * margins - 0.8)))
    scale, shift = fit_calibration(truth, margins)
    assert (scale, shift) == pytest.approx((0.6, -0.8), abs=0.05)
    honest = 1 / (1 + np.exp(-(scale * margins + shift)))
    assert calibration_error(truth, honest) < 0.02
    assert calibration_error(truth, np.sqrt(honest)) > 0.1
    assert calibration_error(np.array([True, False]), np.array([1.0, 1.0])) == pytest.approx(0.5)


def test_a_separable_sample_does_not_break_calibration() -> None:
    scale, shift = fit_calibration(np.array([False] * 5 + [True] * 5), np.arange(10.0))
    assert np.isfinite([scale, shift]).all()
    assert scale > 0


def test_operating_points_are_ordered_and_do_what_they_say() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(4_000) < 0.3
    scores = np.clip(rng.normal(np.where(truth, 0.7, 0.3), 0.15), 0, 1)
    points = operating_points(truth, scores)
    assert points["sensitive"] <= points["balanced"] <= points["precise"]
    assert decide(truth, scores, points["precise"])[0] >= 0.92
    assert decide(truth, scores, points["sensitive"])[1] >= 0.93
    quiet = operating_points(truth, scores, statements=500)["balanced"]
    assert quiet > points["balanced"]
    assert ((scores >= quiet) & ~truth).sum() <= 50 < ((scores >= points["balanced"]) & ~truth).sum()


@given(st.integers(1, 300), st.integers(1, 32))
def test_an_epoch_visits_every_pair_once(number: int, size: int) -> None:
    lengths = np.arange(number) % 17
    visited = [i for batch in batches(lengths, size, random.Random(3)) for i in batch]
    assert sorted(visited) == list(range(number))


def test_numbers_are_spelled_as_people_do() -> None:
    assert [spell(n) for n in (0, 13, 40, 57, 100, 305, 999)] == [
        "zero",
        "thirteen",
        "forty",
        "fifty-seven",
        "one hundred",
        "three hundred and five",
        "nine hundred and ninety-nine",
    ]
    with pytest.raises(ValueError, match="0 to 999"):
        spell(1_000)


def test_named_things_are_recognised() -> None:
    assert named("Truck 14 left the Rotterdam depot") == {"truck", "14", "rotterdam"}
    assert named("db-7 isn't Mira's") == {"db-7", "mira"}


STORY = Story(
    "gate",
    ("the gate is shut", "the dog barks", "the gate is open", "nothing is open at the gate", "the dog is brown"),
    {(2, 0): CONTRADICTION, (3, 0): ENTAILMENT, (3, 2): CONTRADICTION},
    "test",
)


def test_every_pair_of_a_story_is_labelled_once_and_the_older_comes_first() -> None:
    examples = story_examples([STORY])
    assert len(examples) == 10
    told = {(e.first, e.second): e.label for e in examples}
    assert told["the gate is shut", "the gate is open"] == CONTRADICTION
    assert told["the gate is shut", "nothing is open at the gate"] == NOT_CONTRADICTION
    assert told["the dog barks", "the dog is brown"] == NEUTRAL
    assert ("the gate is open", "the gate is shut") not in told


def test_training_takes_all_that_is_marked_and_the_nearest_of_the_rest() -> None:
    taken = training_pairs([STORY], 1, quiet=1)
    labels = [e.label for e in taken]
    assert (labels.count(CONTRADICTION), labels.count(NOT_CONTRADICTION), labels.count(NEUTRAL)) == (2, 1, 2)


def test_the_stories_are_whole() -> None:
    stories = read_stories(OWN_CORPUS / "stories")
    assert len(stories) >= 100
    assert {story.split for story in stories} == {"train", "dev", "test"}
    for story in stories:
        assert len(set(story.lines)) == len(story.lines), story.name
        assert sum(label == CONTRADICTION for label in story.relations.values()) >= 2, story.name


def test_a_relation_to_a_later_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"name": "x", "lines": ["a", "b"], "relations": [[0, "!", 1]]}\n')
    with pytest.raises(ValueError, match="bad relation"):
        read_stories(tmp_path)


def test_a_pair_is_read_in_both_orders() -> None:
    rng = random.Random(2)
    pair = Example("a", "b", ENTAILMENT, "s", "k")
    seen = {either_way(rng, pair) for _ in range(50)}
    assert seen == {pair, turned(pair)}


@given(st.integers(1, 5_000), st.floats(0.1, 1.0))
def test_the_learning_rate_rises_holds_and_falls(steps: int, settle: float) -> None:
    stage = Stage("s", 1.0, 1e-4, settle=settle)
    scales = [stage.scale(at, steps) for at in range(steps)]
    assert all(0 < scale <= 1 for scale in scales)
    top = scales.index(max(scales))
    assert scales[: top + 1] == sorted(scales[: top + 1])
    assert scales[top:] == sorted(scales[top:], reverse=True)
    assert scales[-1] <= 1 / (settle * max(1, steps - max(1, int(0.06 * steps)))) + 1e-9


# Two entries of each file in the form of WordNet 3.0 (wndb(5WN)); the numbers are the addresses of the entries.
DATA = """\
  1 a line of the licence begins with two blanks
00000100 00 a 02 open 0 unfastened 0 002 & 00000300 a 0000 ! 00000200 a 0101 | affording free passage
00000200 00 a 02 closed 0 shut 0 001 ! 00000100 a 0101 | not open
"""
INDEX = """\
  1 a line of the licence begins with two blanks
closed a 1 1 ! 1 1 00000200
open a 1 2 & ! 1 1 00000100
shut a 1 1 ! 1 1 00000200
unfastened a 1 2 & ! 1 0 00000100
"""


@pytest.fixture
def opposites(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "data.adj").write_text(DATA, encoding="latin-1")
    (tmp_path / "index.adj").write_text(INDEX, encoding="latin-1")
    return read_adjectives(tmp_path)


def test_only_the_word_that_has_the_antonym_gets_it(opposites: dict[str, str]) -> None:
    assert opposites == {"open": "closed", "closed": "open"}


def test_an_opposite_is_put_where_it_cannot_hold_beside_the_word(opposites: dict[str, str]) -> None:
    told = ["The vestry door was open.", "The upper gate is closed at night."]
    not_told = [
        "The open door was heavy.",  # before a noun
        "The door was not open.",
        "The door is open if the bell rings.",
        "The door, which was old, is open.",
        "The door is open and the gate is closed.",
        "Is the door open?",
    ]
    split = split_of("closed")
    variants = [
        f"The {thing} door is open." for thing in ("north", "south", "east", "west", "red", "blue", "old", "new")
    ]
    sentences = [text for text in told + not_told + variants if split_of(text) == split]
    clusters = {each.anchor: each for each in substituted_clusters(sentences, opposites, split, 1)}
    assert clusters
    assert not set(clusters) & set(not_told)
    for anchor, cluster in clusters.items():
        labels = {item.text: item.label for item in cluster.items}
        word, anti = ("open", "closed") if "open" in anchor else ("closed", "open")
        assert labels[anchor.replace(word, anti)] == CONTRADICTION
        assert labels[anchor.replace(word, f"not {word}")] == CONTRADICTION
        assert labels[anchor.replace(word, f"not {anti}")] == ENTAILMENT
        assert NEUTRAL in labels.values()


def test_a_mean_is_of_stages_that_have_run_by_then(tmp_path: Path) -> None:
    order = [stage.name for stage, _ in recipe.STAGES]
    for stage, begins in recipe.BEGINS_AT.items():
        assert all(order.index(name) < order.index(stage) for name in begins)
    assert set(recipe.AVERAGED) <= set(order)
    for number, name in enumerate(recipe.AVERAGED):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / f"{name}.done.pt")
    mean = training_main._averaged(tmp_path, recipe.AVERAGED)
    assert mean["w"].tolist() == [sum(range(len(recipe.AVERAGED))) / len(recipe.AVERAGED)] * 2
