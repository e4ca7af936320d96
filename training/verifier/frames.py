"""Sentence frames of the generators: text with slots, in groups of one label and kind, a part of each kept for measuring."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.verifier.examples import LABELS, Split

Draft = tuple[str, list[tuple[str, int, str]]]
"""An anchor, and (text, label, kind) of its items."""
_LABEL_OF = {name[0].upper(): label for name, label in LABELS.items()}


@dataclass(frozen=True, slots=True)
class Group:
    """Ways to say one thing about an anchor. ``label``: None for the anchor itself."""

    label: int | None
    kind: str
    train: tuple[str, ...]
    test: tuple[str, ...]

    def say(self, rng: random.Random, split: Split, slots: Mapping[str, object]) -> str:
        return rng.choice(self.train if split == "train" else self.test).format_map(slots).strip()


def read_frames(text: str) -> tuple[Group, ...]:
    """Groups from lines: "C antonym:" (or E, N; "A anchor:") opens one, the frames follow, those for measuring after "~".

    Raises:
        ValueError: a frame stands before the first group, or a group has no frame for training or none for measuring.
    """
    groups: list[Group] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":") and line[1] == " " and line[0] in "ACEN":
            groups.append(Group(_LABEL_OF.get(line[0]), line[2:-1], (), ()))
            continue
        if not groups:
            raise ValueError(f"{line!r}: no group is open")
        last, kept = groups[-1], line.startswith("~")
        frame = (line.removeprefix("~").strip(),)
        groups[-1] = Group(last.label, last.kind, last.train + frame[kept:], last.test + frame[: int(kept)])
    for group in groups:
        if not group.train or not group.test:
            raise ValueError(f"{group.kind}: expected frames for training and for measuring, got {group}")
    return tuple(groups)


def draft(
    rng: random.Random,
    split: Split,
    groups: Sequence[Group],
    slots: Mapping[str, object],
    *,
    most: Mapping[int, int] | None = None,
) -> Draft:
    """An anchor and one item of each group of ``groups``; ``most``: so many groups of a label, chosen at random."""
    anchors = [group for group in groups if group.label is None]
    items: list[tuple[str, int, str]] = []
    for label in LABELS.values():
        of = [group for group in groups if group.label == label]
        if most is not None and len(of) > most[label]:
            of = rng.sample(of, most[label])
        items += [(group.say(rng, split, slots), label, group.kind) for group in of]
    return rng.choice(anchors).say(rng, split, slots), items
