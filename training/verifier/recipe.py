"""What each stage of the shipped verifier is trained on."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kimera_stream.engines.verifier_model import CrossEncoder
from training.verifier.clusters import (
    Cluster,
    anchor_examples,
    either_way,
    read_clusters,
    training_examples,
    turned,
)
from training.verifier.examples import ENTAILMENT, Example
from training.verifier.generators import generated_clusters
from training.verifier.loop import Stage
from training.verifier.mining import mistaken, neighbours
from training.verifier.public import found_examples, public_examples
from training.verifier.stories import Story, read_stories, training_pairs
from training.verifier.wordnet import DIRECTORY as WORDNET
from training.verifier.wordnet import read_adjectives, substituted_clusters

OWN_CORPUS = Path(__file__).parents[1] / "corpus"


@dataclass(slots=True)
class Materials:
    """Everything that the stages draw from."""

    data: Path
    found: Path | None
    seed: int
    clusters: list[Cluster]
    stories: list[Story]

    @classmethod
    def read(cls, data: Path, seed: int, found: Path | None = None) -> "Materials":
        """Public pairs in ``data`` and (optional) ``found``, clusters and stories in ``training/corpus``."""
        return cls(data, found, seed, read_clusters([OWN_CORPUS]), read_stories(OWN_CORPUS / "stories"))

    @property
    def training_clusters(self) -> list[Cluster]:
        return [cluster for cluster in self.clusters if cluster.split == "train"]

    @property
    def training_stories(self) -> list[Story]:
        return [story for story in self.stories if story.split == "train"]

    def found_pairs(self, seed: int) -> list[Example]:
        """The further public pairs; none where none are at hand."""
        return [] if self.found is None else found_examples(self.found, seed)

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}:{name}")


def _some(rng: random.Random, examples: Sequence[Example], number: int) -> list[Example]:
    return rng.sample(examples, min(number, len(examples)))


def public(materials: Materials, _: CrossEncoder) -> list[Example]:
    """The public pairs, with a taste of the corpus."""
    rng = materials.rng("public")
    corpus = training_examples(materials.training_clusters, materials.seed)
    return public_examples(materials.data, "train", materials.seed) + _some(rng, corpus, 12_000)


def corpus(materials: Materials, _: CrossEncoder) -> list[Example]:
    """Every written pair, some of those derived from them, generated ones, and public ones against forgetting."""
    rng = materials.rng("corpus")
    written = anchor_examples(materials.training_clusters)
    known = {(e.first, e.second) for e in written}
    every = training_examples(materials.training_clusters, materials.seed)
    generated = training_examples(generated_clusters("train", materials.seed), materials.seed)
    return [
        *written,
        *_some(rng, [e for e in every if (e.first, e.second) not in known], 12_000),
        *_some(rng, generated, 9_000),
        *_some(rng, public_examples(materials.data, "train", materials.seed), 4_000),
    ]


def polish(materials: Materials, model: CrossEncoder) -> list[Example]:
    """Every written pair in both orders, and what the model still gets wrong once more; more derived from the clusters
    written against known weaknesses; neighbours from the pool; some generated and public ones."""
    rng = materials.rng("polish")
    clusters = materials.training_clusters
    written = anchor_examples(clusters)
    targeted = training_examples([c for c in clusters if c.source.startswith("extra_")], materials.seed)
    generated = training_examples(generated_clusters("train", materials.seed + 1), materials.seed)
    both = [*written, *map(turned, written)]
    return [
        *both,
        *mistaken(model, _some(rng, both, 8_000)),
        *_some(rng, targeted, 5_000),
        *_some(rng, training_examples(clusters, materials.seed + 1), 4_000),
        *_some(rng, generated, 4_000),
        *_some(rng, public_examples(materials.data, "train", materials.seed), 3_000),
        *neighbours(clusters, materials.seed, items=5_000, most=2_500),
    ]


def wider(materials: Materials, _: CrossEncoder) -> list[Example]:
    """Further public pairs, where they are at hand, with a part of the corpus so that nothing is forgotten."""
    rng = materials.rng("wider")
    if materials.found is None:
        return []
    written = [either_way(rng, example) for example in anchor_examples(materials.training_clusters)]
    return [*found_examples(materials.found, materials.seed), *_some(rng, written, 9_000)]


def grown(materials: Materials, _: CrossEncoder) -> list[Example]:
    """The clusters of the second writing and the stories, twins of anchors; a part of everything older against forgetting."""
    rng = materials.rng("grown")
    clusters = materials.training_clusters
    fresh = [cluster for cluster in clusters if cluster.source.startswith("written_")]
    older = [cluster for cluster in clusters if not cluster.source.startswith("written_")]
    generated = training_examples(generated_clusters("train", materials.seed + 2), materials.seed)
    found = materials.found_pairs(materials.seed + 1)
    return [
        *(either_way(rng, example) for example in anchor_examples(fresh)),
        *training_pairs(materials.training_stories, materials.seed),
        *_some(rng, [either_way(rng, example) for example in anchor_examples(older)], 5_000),
        *_some(rng, training_examples(clusters, materials.seed + 2), 4_000),
        *_some(rng, generated, 2_500),
        *_some(rng, public_examples(materials.data, "train", materials.seed), 2_500),
        *_some(rng, found, 4_000),
        *neighbours(clusters, materials.seed + 2, items=4_000, most=2_000),
    ]


def _said_again(rng: random.Random, text: str) -> str:
    """``text`` as somebody else would repeat it: the same words, other capitals, dots, articles or contractions."""
    changes: list[Callable[[str], str]] = [
        lambda told: told,
        str.lower,
        lambda told: told.rstrip(".") if told.endswith(".") else f"{told}.",
        lambda told: re.sub(r"\b(?:the|a|an) ", "", told, count=1, flags=re.IGNORECASE),
        lambda told: (
            told.replace(" is not ", " isn't ").replace(" does not ", " doesn't ").replace(" was not ", " wasn't ")
        ),
        lambda told: (
            told.replace(" and ", " & ")
            if rng.random() < 0.3
            else f"{rng.choice(['FYI: ', 'note: ', 'As said, ', 'Again: '])}{told}"
        ),
    ]
    return rng.choice(changes)(rng.choice(changes)(text))


def repeated(materials: Materials, _: CrossEncoder) -> list[Example]:
    """What is said again is no contradiction. No set has such pairs, and without them a model takes a number in a statement
    that looks like another for a clash. A short stage, with enough of everything else to change nothing else."""
    rng = materials.rng("repeated")
    texts = [cluster.anchor for cluster in materials.training_clusters]
    texts += [item.text for cluster in materials.training_clusters for item in cluster.items[:1]]
    texts += [line for story in materials.training_stories for line in story.lines[:3]]
    written = [either_way(rng, example) for example in anchor_examples(materials.training_clusters)]
    return [
        *(
            Example(text, _said_again(rng, text), ENTAILMENT, "repeated", "repeated")
            for text in rng.sample(texts, 1_500)
        ),
        *_some(rng, written, 4_500),
        *_some(rng, training_pairs(materials.training_stories, materials.seed + 2, quiet=4), 2_500),
        *_some(rng, public_examples(materials.data, "train", materials.seed + 2), 800),
        *_some(rng, materials.found_pairs(materials.seed + 3), 700),
    ]


def settled(materials: Materials, model: CrossEncoder) -> list[Example]:
    """What the model still gets wrong, among fresh samples of everything; the learning rate falls to nothing."""
    rng = materials.rng("settled")
    clusters = materials.training_clusters
    written = [either_way(rng, example) for example in anchor_examples(clusters)]
    told = training_pairs(materials.training_stories, materials.seed + 1, quiet=4)
    generated = training_examples(generated_clusters("train", materials.seed + 3), materials.seed)
    found = materials.found_pairs(materials.seed + 2)
    return [
        *mistaken(model, _some(rng, [*written, *told], 10_000)),
        *_some(rng, written, 14_000),
        *_some(rng, told, 8_000),
        *_some(rng, training_examples(clusters, materials.seed + 3), 3_000),
        *_some(rng, generated, 1_500),
        *_some(rng, public_examples(materials.data, "train", materials.seed + 1), 1_500),
        *_some(rng, found, 3_000),
        *neighbours(clusters, materials.seed + 3, items=4_000, most=1_500),
    ]


def broad(materials: Materials, _: CrossEncoder) -> list[Example]:
    """Everything once, the written pairs in both orders, at a level rate: what the earlier stages saw a part of."""
    clusters, seed = materials.training_clusters, materials.seed + 10
    rng = materials.rng("broad")
    written = anchor_examples(clusters)
    found = materials.found_pairs(seed)
    return [
        *written,
        *map(turned, written),
        *_some(rng, training_examples(clusters, seed), 60_000),
        *training_pairs(materials.training_stories, seed, quiet=5),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 20_000),
        *_some(rng, public_examples(materials.data, "train", seed), 30_000),
        *found,
        *neighbours(clusters, seed, items=9_000, most=6_000),
    ]


def final(materials: Materials, model: CrossEncoder) -> list[Example]:
    """Everything written once more and more of each story, antonyms in real sentences, what is still wrong twice; the rate falls
    to nothing."""
    clusters, seed = materials.training_clusters, materials.seed + 11
    rng = materials.rng("final")
    written = [either_way(rng, example) for example in anchor_examples(clusters)]
    told = training_pairs(materials.training_stories, seed, quiet=6)
    found = materials.found_pairs(seed)
    texts = [cluster.anchor for cluster in clusters]
    return [
        *written,
        *told,
        *mistaken(model, _some(rng, [*written, *told], 30_000)),
        *_some(rng, training_examples(clusters, seed), 20_000),
        *training_examples(antonyms(materials), seed),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 8_000),
        *_some(rng, public_examples(materials.data, "train", seed), 14_000),
        *_some(rng, found, 26_000),
        *neighbours(clusters, seed, items=9_000, most=5_000),
        *(
            Example(text, _said_again(rng, text), ENTAILMENT, "repeated", "repeated")
            for text in _some(rng, texts, 2_000)
        ),
    ]


def wide(materials: Materials, _: CrossEncoder) -> list[Example]:
    """Everything once more in other samples, most of all stories, with more of their compatible pairs; at a level rate."""
    clusters, seed = materials.training_clusters, materials.seed + 20
    rng = materials.rng("wide")
    return [
        *(either_way(rng, example) for example in anchor_examples(clusters)),
        *training_pairs(materials.training_stories, seed, quiet=8),
        *_some(rng, training_examples(clusters, seed), 25_000),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 10_000),
        *_some(rng, public_examples(materials.data, "train", seed), 15_000),
        *_some(rng, materials.found_pairs(seed), 45_000),
        *neighbours(clusters, seed, items=9_000, most=5_000),
    ]


def last(materials: Materials, model: CrossEncoder) -> list[Example]:
    """The stories above all, with the text written last, and what is still wrong twice; the rate falls to nothing."""
    clusters, seed = materials.training_clusters, materials.seed + 21
    rng = materials.rng("last")
    written = [either_way(rng, example) for example in anchor_examples(clusters)]
    told = training_pairs(materials.training_stories, seed, quiet=7)
    fresh = [cluster for cluster in clusters if cluster.source.endswith("_last")]
    newest = [story for story in materials.training_stories if story.source == "late"]
    texts = [cluster.anchor for cluster in clusters]
    return [
        *_some(rng, written, 75_000),
        *told,
        *training_pairs(newest, seed + 1, quiet=9),
        *map(turned, anchor_examples(fresh)),
        *mistaken(model, _some(rng, [*written, *told], 30_000)),
        *_some(rng, training_examples(clusters, seed), 12_000),
        *_some(rng, training_examples(antonyms(materials), seed), 4_000),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 6_000),
        *_some(rng, public_examples(materials.data, "train", seed), 10_000),
        *_some(rng, materials.found_pairs(seed), 20_000),
        *neighbours(clusters, seed, items=9_000, most=5_000),
        *(
            Example(text, _said_again(rng, text), ENTAILMENT, "repeated", "repeated")
            for text in _some(rng, texts, 1_500)
        ),
    ]


def marked(materials: Materials, _: CrossEncoder) -> list[Example]:
    """A part of everything, with the marks of ``verifier_marks``, whose rows learn faster; at a level rate."""
    clusters, seed = materials.training_clusters, materials.seed + 30
    rng = materials.rng("marked")
    return [
        *_some(rng, [either_way(rng, example) for example in anchor_examples(clusters)], 30_000),
        *_some(rng, training_pairs(materials.training_stories, seed, quiet=6), 10_000),
        *_some(rng, training_examples(antonyms(materials), seed), 4_000),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 3_000),
        *_some(rng, public_examples(materials.data, "train", seed), 3_000),
        *_some(rng, materials.found_pairs(seed), 5_000),
    ]


def fifth(materials: Materials, model: CrossEncoder) -> list[Example]:
    """The fifth writing in both orders, what is still wrong, and a part of everything else; the rate falls to nothing."""
    clusters, seed = materials.training_clusters, materials.seed + 31
    rng = materials.rng("fifth")
    fresh = [cluster for cluster in clusters if cluster.source.startswith("fifth_")]
    older = [cluster for cluster in clusters if not cluster.source.startswith("fifth_")]
    written = [either_way(rng, example) for example in anchor_examples(older)]
    told = training_pairs(materials.training_stories, seed, quiet=6)
    new = anchor_examples(fresh)
    return [
        *new,
        *map(turned, new),
        *_some(rng, training_examples(fresh, seed), 6_000),
        *mistaken(model, _some(rng, [*written, *told], 16_000)),
        *_some(rng, written, 10_000),
        *_some(rng, told, 12_000),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 5_000),
        *_some(rng, public_examples(materials.data, "train", seed), 3_000),
        *_some(rng, materials.found_pairs(seed), 5_000),
        *neighbours(clusters, seed, items=4_000, most=2_500),
    ]


def sixth(materials: Materials, model: CrossEncoder) -> list[Example]:
    """The sixth writing in both orders, what is still wrong, and a part of everything else; the rate falls to nothing."""
    return _with_sixth(materials, model, "sixth", materials.seed + 40)


def sixth_again(materials: Materials, model: CrossEncoder) -> list[Example]:
    """The sixth writing once more, from where ``sixth`` began, beside another part of everything else."""
    return _with_sixth(materials, model, "sixth_again", materials.seed + 41)


def _with_sixth(materials: Materials, model: CrossEncoder, name: str, seed: int) -> list[Example]:
    clusters, rng = materials.training_clusters, materials.rng(name)
    fresh = [cluster for cluster in clusters if cluster.source.startswith("sixth_")]
    older = [cluster for cluster in clusters if not cluster.source.startswith("sixth_")]
    written = [either_way(rng, example) for example in anchor_examples(older)]
    told = training_pairs(materials.training_stories, seed, quiet=6)
    new = anchor_examples(fresh)
    return [
        *new,
        *map(turned, new),
        *_some(rng, training_examples(fresh, seed), 6_000),
        *mistaken(model, _some(rng, [*written, *told], 24_000)),
        *_some(rng, written, 18_000),
        *_some(rng, told, 14_000),
        *_some(rng, training_examples(antonyms(materials), seed), 2_500),
        *_some(rng, training_examples(generated_clusters("train", seed), seed), 4_000),
        *_some(rng, public_examples(materials.data, "train", seed), 4_000),
        *_some(rng, materials.found_pairs(seed), 7_000),
        *neighbours(clusters, seed, items=4_000, most=2_500),
    ]


def antonyms(materials: Materials) -> list[Cluster]:
    """Clusters made with WordNet from sentences of the training parts; none where WordNet is not installed."""
    if not (WORDNET / "data.adj").is_file():
        print(f"no WordNet in {WORDNET} (Debian's wordnet-base): the stage goes without its antonyms", flush=True)
        return []
    pairs = public_examples(materials.data, "train", materials.seed)
    if materials.found is not None:
        pairs += found_examples(materials.found, materials.seed)
    sentences = {text for pair in pairs for text in (pair.first, pair.second)}
    sentences.update(cluster.anchor for cluster in materials.training_clusters)
    sentences.update(line for story in materials.training_stories for line in story.lines)
    return list(substituted_clusters(sorted(sentences), read_adjectives(), "train", materials.seed))


BEGINS_AT = {"sixth": ("last", "fifth"), "sixth_again": ("last", "fifth")}
"""Stages that begin at the mean of what others ended with, where not at what the one before ended with."""

AVERAGED = ("last", "fifth", "sixth", "sixth_again")
"""Stages whose weights are averaged into what ships: the mean is better on text of writers that neither has met than either (model
soups, Wortsman et al. 2022). Only stages of one run lie near enough to each other for that."""

STAGES: list[tuple[Stage, Callable[[Materials, CrossEncoder], list[Example]]]] = [
    (Stage("public", epochs=1.0, rate=1.2e-4, batch=48), public),
    (Stage("corpus", epochs=1.0, rate=1.1e-4, batch=32), corpus),
    (Stage("polish", epochs=1.15, rate=1e-4, batch=32), polish),
    (Stage("wider", epochs=1.0, rate=8e-5, batch=32, frozen=1, settle=0.25), wider),
    (Stage("grown", epochs=1.0, rate=8e-5, batch=32, frozen=1, settle=0.15), grown),
    (Stage("settled", epochs=1.0, rate=8e-5, batch=32, frozen=1), settled),
    (Stage("repeated", epochs=1.0, rate=3e-5, batch=32, frozen=1), repeated),
    (Stage("broad", epochs=1.0, rate=9e-5, batch=32, frozen=1, settle=0.08), broad),
    (Stage("final", epochs=1.0, rate=9e-5, batch=32, frozen=1), final),
    (Stage("wide", epochs=1.0, rate=8e-5, batch=48, frozen=1, settle=0.05), wide),
    (Stage("last", epochs=1.0, rate=8e-5, batch=48, frozen=1), last),
    (Stage("marked", epochs=1.0, rate=6e-5, batch=48, settle=0.05), marked),
    (Stage("fifth", epochs=1.0, rate=6e-5, batch=48), fifth),
    (Stage("sixth", epochs=1.0, rate=6e-5, batch=48), sixth),
    (Stage("sixth_again", epochs=1.0, rate=6e-5, batch=48), sixth_again),
]
