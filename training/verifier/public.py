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
FOUND = {
    "mnli_a": 13_000,
    "mnli_b": 13_000,
    "wanli": 12_000,
    "fever_train_part": 7_000,
    "snli_a": 15_000,
    "negation_nli": 2_000,
    "ambient": 2_000,
    "fool_me_twice": 1_500,
    "med": 1_000,
    "scone": 1_000,
    "hans": 700,
}
"""Further public sets (docs/model_card.md says where each is from), and pairs taken of each at most. MED, ScoNe and HANS have no
contradictions: few of them, or "neutral" becomes their style."""
FOUND_WORDS = 36
"""Words of a pair of a further set at most: statements are short, and long pairs cost the most time."""


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
    """Pairs of those further public sets (``FOUND``) that are in ``directory``, in the form of the public pairs.

    Splits hold: a pair whose premise is kept for measuring is not taken.
    """
    chosen: list[Example] = []
    for name, most in FOUND.items():
        if not (directory / f"{name}.jsonl.gz").is_file():
            continue
        rows = [
            row
            for row in read_public(directory, name)
            if split_of(row.first) == "train" and len(f"{row.first} {row.second}".split()) <= FOUND_WORDS
        ]
        chosen += random.Random(f"{seed}:{name}").sample(rows, min(most, len(rows)))
    return chosen
