"""What the training may read, what it reads, and what the card of its weights says of it."""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # training is not installed with the package

from kimera_stream.api.demo.feed import load_feed
from kimera_stream.engines.verifier_model import CrossEncoder
from kimera_stream.engines.verifier_runtime import shipped_weights
from training.verifier import public, recipe, sources
from training.verifier.clusters import Cluster, Item, read_clusters
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, Example, read_lines
from training.verifier.generators import generated_clusters
from training.verifier.public import FOUND, MEASURING, TRAINING
from training.verifier.recipe import OWN_CORPUS, STAGES, Materials
from training.verifier.stories import Story, read_stories

FORBIDDEN = re.compile(r"\bNC\b|non-?commercial|\bND\b|no derivatives|research only|unknown", re.IGNORECASE)


@pytest.fixture(scope="module")
def clusters() -> list[Cluster]:
    return read_clusters([OWN_CORPUS])


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return read_stories(OWN_CORPUS / "stories")


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.casefold()))


def test_no_statement_of_the_demo_feed_is_in_the_corpus(clusters: list[Cluster], stories: list[Story]) -> None:
    feed = {plain(item.text) for item in load_feed() if item.text is not None}
    assert len(feed) > 300
    told = {plain(text) for c in clusters for text in (c.anchor, *(item.text for item in c.items))}
    told |= {plain(line) for story in stories for line in story.lines}
    told |= {plain(i.text) for c in generated_clusters("train", 7, share=0.2) for i in c.items}
    assert not feed & told


def test_a_statement_told_otherwise_is_still_recognised() -> None:
    assert plain("  The Gate-house IS open. ") == plain("the gate house is open")


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A few pairs under the name of every public set there is, those for measuring too, and of one that nobody knows."""
    for name in (*(source.file for source in TRAINING), *FOUND, *MEASURING, "stray"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for n in range(30):
                label = ("contradiction", "entailment", "neutral")[n % 3]
                pair = {"premise": f"{name} line {n} is here.", "hypothesis": f"{name} {n} is there.", "label": label}
                file.write(json.dumps(pair) + "\n")
    return tmp_path


@pytest.fixture
def materials(sets: Path) -> Materials:
    items = tuple(
        Item(text, label, "antonym") for text, label in (("b", CONTRADICTION), ("c", ENTAILMENT), ("d", NEUTRAL))
    )
    own = [Cluster(f"the {n} gate is open", items, source) for n in range(500) for source in ("ops", "written_last")]
    told = [
        Story("s", (f"line {n} is up", "it is not", "so be it", "it is raining"), {(1, 0): CONTRADICTION}, "late")
        for n in range(20)
    ]
    return Materials(sets, sets, 7, own, told)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the public files that were opened; what needs the encoder, a model or WordNet is left out."""
    names: set[str] = set()

    def read(path: Path) -> Iterator[dict[str, object]]:
        names.add(path.name.split(".")[0])
        return read_lines(path)

    monkeypatch.setattr(public, "read_lines", read)
    monkeypatch.setattr(recipe, "generated_clusters", lambda split, seed: generated_clusters(split, seed, share=0.01))
    monkeypatch.setattr(recipe, "neighbours", lambda *_, **__: [])
    monkeypatch.setattr(recipe, "mistaken", lambda model, examples, **_: list(examples)[:5])
    monkeypatch.setattr(recipe, "antonyms", lambda _: [])
    return names


def test_no_stage_reads_what_is_for_measuring_or_not_commercial(materials: Materials, opened: set[str]) -> None:
    known = sources.licences(materials.clusters, materials.stories)
    model = CrossEncoder.__new__(CrossEncoder)  # no stage computes anything here
    read: set[str] = set()
    for stage, choose in STAGES:
        examples = choose(materials, model)
        assert examples, stage.name
        read |= {example.source for example in examples}
        told = " ".join(f"{example.first} {example.second}" for example in examples)
        assert not [name for name in (*MEASURING, "stray") if name in told], stage.name
    assert opened == {source.file for source in TRAINING} | set(FOUND)
    card = {row["name"]: row["licence"] for row in sources.named(read, known)}
    assert set(card) == opened | {"ops", "written_last", "stories/late", "templates"}
    assert not [name for name, licence in card.items() if FORBIDDEN.search(licence)]


def test_measuring_sets_and_training_sets_are_apart() -> None:
    trained = {source.file for source in TRAINING} | set(FOUND)
    assert not trained & set(MEASURING)
    assert not [name for name in trained if re.search(r"sick|dev_part|cad_dev|conjnli_dev|eval", name)]
    assert set(FOUND) == set(sources.FOUND_LICENCES)
    for licence in (*sources.FOUND_LICENCES.values(), *(source.licence for source in TRAINING)):
        assert licence, licence
        assert not FORBIDDEN.search(licence), licence


def test_a_source_without_a_known_licence_is_refused() -> None:
    known = {"ops": sources.OWN, "templates": sources.OWN, "stories/late": sources.OWN, "wordnet": sources.WORDNET}
    assert sources.named(["ops", "pool", "generated-state", "generated-count"], known) == [
        {"name": "ops", "licence": sources.OWN},
        {"name": "templates", "licence": sources.OWN},
    ]
    assert sources.named(["story"], known) == [{"name": "stories/late", "licence": sources.OWN}]
    with pytest.raises(ValueError, match="no licence is known of sick"):
        sources.named(["ops", "sick"], known)


def test_the_shipped_card_names_all_that_was_read(clusters: list[Cluster], stories: list[Story]) -> None:
    card = json.loads(shipped_weights().with_suffix(".json").read_text(encoding="utf-8"))
    told = {row["name"]: row["licence"] for row in card["data"]}
    assert told == sources.licences(clusters, stories)


def test_the_premise_decides_what_a_further_set_may_give(sets: Path) -> None:
    found = public.found_examples(sets, 3)
    assert {example.source for example in found} == set(FOUND)
    assert all(public.split_of(example.first) == "train" for example in found)
    long = Example("word " * 40, "x", NEUTRAL, "wanli", "")
    with gzip.open(sets / "wanli.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"premise": long.first, "hypothesis": long.second, "label": "neutral"}) + "\n")
    assert "wanli" not in {example.source for example in public.found_examples(sets, 3)}
