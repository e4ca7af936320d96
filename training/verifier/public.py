"""The public pairs: which may train, how many of each, and which are for measuring only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.verifier.examples import LABELS, NEUTRAL, Example, Split, read_lines, split_of


@dataclass(frozen=True, slots=True)
class Source:
    """A public set. ``limits``: examples per label used at most; a label that is not named is used whole."""

    file: str
    licence: str
    limits: dict[str, int]


TRAINING = (
    Source("snli_dev", "CC BY-SA 4.0", {}),
    Source("mnli_train", "OANC, CC BY 3.0, CC BY-SA 3.0, MIT", {}),
    Source("cad_train", "Apache-2.0; SNLI text CC BY-SA 4.0", {}),
    Source("conjnli_train", "MIT", {"entailment": 3_500, "neutral": 4_500}),
    # Contradictions only: few of them, or "one word changed" becomes the rule.
    Source("wikifactcheck_part", "CC BY-SA 4.0", {"contradiction": 3_000}),
    Source("semantoneg_part", "CC BY-SA 4.0", {"contradiction": 2_600}),
    Source("breaking_nli_part", "CC BY-SA 4.0", {"contradiction": 1_500}),
)
MEASURING = ("mnli_dev_part", "cad_dev", "conjnli_dev", "sick_trial_eval_only")
"""Never trained on, nor used for choosing or calibrating."""
UNRELATED = 3_000
FOUND_MOST = 20_000
"""Pairs taken of one further set at most."""


def read_public(data: Path, source: str) -> Iterator[Example]:
    """All pairs of one set."""
    for row in read_lines(data / f"{source}.jsonl.gz"):
        if row["premise"] and row["hypothesis"]:
            yield Example(row["premise"], row["hypothesis"], LABELS[row["label"]], source, "")


def public_examples(data: Path, split: Split, seed: int) -> list[Example]:
    """The pairs of ``split`` of every set that may train; for training also limited, and with unrelated pairs added."""
    chosen: list[Example] = []
    for source in TRAINING:
        rng = random.Random(f"{seed}:{source.file}")
        rows = [row for row in read_public(data, source.file) if split_of(row.first) == split]
        rng.shuffle(rows)
        taken = dict.fromkeys(LABELS.values(), 0)
        for row in rows:
            taken[row.label] += 1
            limit = {LABELS[name]: value for name, value in source.limits.items()}.get(row.label)
            if split != "train" or limit is None or taken[row.label] <= limit:
                chosen.append(row)
    if split == "train":
        rng = random.Random(f"{seed}:unrelated")
        for _ in range(UNRELATED):
            one, other = rng.sample(chosen, 2)
            if one.first != other.first:
                chosen.append(Example(one.first, other.second, NEUTRAL, "unrelated", "unrelated"))
    return chosen


def found_examples(directory: Path, seed: int) -> list[Example]:
    """Pairs of further public sets: every ``*.jsonl.gz`` in ``directory``, of the same form as the public pairs. Which files
    went into the shipped weights, where they are from and under which licence is told in ``docs/model_card.md``.

    Pairs are taken up to ``FOUND_MOST`` a set. Splits hold: what is measured elsewhere is not read here.
    """
    chosen: list[Example] = []
    for path in sorted(directory.glob("*.jsonl.gz")):
        name = path.name.split(".")[0]
        rows = [row for row in read_public(directory, name) if split_of(row.first) == "train"]
        rng = random.Random(f"{seed}:{name}")
        chosen += rng.sample(rows, min(FOUND_MOST, len(rows)))
    return chosen
