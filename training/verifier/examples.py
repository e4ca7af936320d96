"""One training or measuring example, and the split that never moves."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CONTRADICTION, ENTAILMENT, NEUTRAL, NOT_CONTRADICTION = 0, 1, 2, 3
"""The last one: known not to contradict, without knowing which of the other two it is."""
LABELS = {"contradiction": CONTRADICTION, "entailment": ENTAILMENT, "neutral": NEUTRAL}

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """A pair of statements with its label. ``source`` names the set, ``kind`` the phenomenon."""

    first: str
    second: str
    label: int
    source: str
    kind: str


def split_of(key: str) -> Split:
    """The split of everything that shares ``key`` (an anchor, a premise): 85 % train, 6 % dev, 9 % test, for ever."""
    bucket = int.from_bytes(hashlib.blake2b(key.strip().lower().encode(), digest_size=4).digest(), "big") % 100
    if bucket < 6:
        return "dev"
    return "test" if bucket < 15 else "train"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as broken:
                    raise ValueError(f"{path.name}, line {number}: not a JSON object") from broken
