"""The contrastive corpus: clusters of an anchor with statements that contradict it, follow from it, or do neither."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from training.verifier.examples import (
    CONTRADICTION,
    ENTAILMENT,
    LABELS,
    NEUTRAL,
    NOT_CONTRADICTION,
    Example,
    Split,
    read_lines,
    split_of,
)

SAME_MEANING = frozenset({"paraphrase", "lexical", "passive", "number-words", "unit", "abbreviation", "role-converse"})
"""Kinds of entailment that say what the anchor says, neither more nor less: they may stand for it."""

KEPT_OUT = frozenset({"fifth_feeds"})
"""Files of which nothing is trained: a domain and a writer that no training has met."""


@dataclass(frozen=True, slots=True)
class Item:
    text: str
    label: int
    kind: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """An anchor and its items, labelled relative to it. ``source``: the file it came from."""

    anchor: str
    items: tuple[Item, ...]
    source: str

    @property
    def split(self) -> Split:
        """By the anchor; of what is kept out whole, always ``test``."""
        return "test" if self.source in KEPT_OUT else split_of(self.anchor)


def read_clusters(directories: Iterable[Path]) -> list[Cluster]:
    """All clusters of all ``*.jsonl`` and ``*.jsonl.gz`` in ``directories``.

    Raises:
        ValueError: a line is not a cluster, an item has an unknown label, or an anchor occurs twice with other items.
    """
    clusters: list[Cluster] = []
    seen: set[str] = set()
    for directory in directories:
        for path in sorted([*directory.glob("*.jsonl"), *directory.glob("*.jsonl.gz")]):
            source = path.name.split(".")[0]
            for row in read_lines(path):
                try:
                    items = tuple(Item(i["text"], LABELS[i["label"]], i["kind"]) for i in row["items"])
                except KeyError as missing:
                    raise ValueError(
                        f"{path.name}: cluster {row.get('anchor')!r} has no or a wrong {missing}"
                    ) from missing
                if row["anchor"] not in seen:
                    seen.add(row["anchor"])
                    clusters.append(Cluster(row["anchor"], items, source))
    return clusters


def anchor_examples(clusters: Iterable[Cluster]) -> list[Example]:
    """The pairs as written: anchor first."""
    return [
        Example(cluster.anchor, item.text, item.label, cluster.source, item.kind)
        for cluster in clusters
        for item in cluster.items
    ]


def turned(example: Example) -> Example:
    """The pair in the other order: a contradiction holds in both, and what does not contradict in one does not in the other."""
    label = CONTRADICTION if example.label == CONTRADICTION else NOT_CONTRADICTION
    return Example(example.second, example.first, label, example.source, example.kind)


def either_way(rng: random.Random, example: Example) -> Example:
    """The pair as it is, or turned round: a server meets both orders."""
    return example if rng.random() < 0.6 else turned(example)


def training_examples(clusters: Iterable[Cluster], seed: int) -> list[Example]:
    """Pairs to learn from: as written, turned round, with the anchor replaced by what means the same, and strangers."""
    rng = random.Random(f"{seed}:clusters")
    pairs: list[Example] = []
    clusters = list(clusters)
    for cluster in clusters:
        source = cluster.source
        for item in cluster.items:
            written = Example(cluster.anchor, item.text, item.label, source, item.kind)
            pairs += [written, turned(written)]
        same = [item for item in cluster.items if item.label == ENTAILMENT and item.kind in SAME_MEANING]
        for twin, item in itertools.product(same, cluster.items):
            if item is twin:
                continue
            label = item.label if item.label != ENTAILMENT else NOT_CONTRADICTION
            if label == NEUTRAL:
                label = NOT_CONTRADICTION
            first, second = (twin.text, item.text) if rng.random() < 0.5 else (item.text, twin.text)
            pairs.append(Example(first, second, label, source, f"{item.kind}"))
    by_source: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        by_source.setdefault(cluster.source, []).append(cluster)
    for cluster in clusters:  # strangers: another world of the same domain
        other = rng.choice(by_source[cluster.source])
        if other is not cluster and other.items and cluster.items:
            pairs.append(Example(cluster.anchor, rng.choice(other.items).text, NEUTRAL, cluster.source, "unrelated"))
    return pairs
