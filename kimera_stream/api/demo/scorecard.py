"""How well the detector did on a labelled feed, pair by pair."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimera_stream.api.cli.console import clean
from kimera_stream.api.demo.feed import (
    CONTRADICTION_KINDS,
    NEAR_MISS_KINDS,
    FeedItem,
    Pair,
    labelled_pairs,
    near_miss_pairs,
)


@dataclass(frozen=True, slots=True)
class Scorecard:
    """Reported pairs against labelled ones.

    Attributes:
        right: Reported and labelled, by pair, with the kind.
        missed: Labelled and not reported, with the kind.
        false: Reported and not labelled, with the kind of near-miss or None.
        near_misses: Number of near-miss pairs by kind.
    """

    right: dict[Pair, str]
    missed: dict[Pair, str]
    false: dict[Pair, str | None]
    near_misses: Counter[str]

    @property
    def precision(self) -> float:
        """Share of the reported pairs that are labelled; 1.0 when nothing was reported."""
        reported = len(self.right) + len(self.false)
        return len(self.right) / reported if reported else 1.0

    @property
    def recall(self) -> float:
        """Share of the labelled pairs that were reported; 1.0 when nothing is labelled."""
        labelled = len(self.right) + len(self.missed)
        return len(self.right) / labelled if labelled else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def score_pairs(feed: Sequence[FeedItem], reported: Iterable[Pair]) -> Scorecard:
    """Compare ``reported`` pairs of feed ids with the labels of ``feed``."""
    found = set(reported)
    labelled = labelled_pairs(feed)
    near = near_miss_pairs(feed)
    return Scorecard(
        right={pair: kind for pair, kind in labelled.items() if pair in found},
        missed={pair: kind for pair, kind in labelled.items() if pair not in found},
        false={pair: near.get(pair) for pair in sorted(found - labelled.keys(), key=sorted)},
        near_misses=Counter(near.values()),
    )


def print_scorecard(
    console: Console, card: Scorecard, feed: Sequence[FeedItem], scores: Mapping[Pair, float], *, missed: bool = True
) -> None:
    """The two tables by kind, then the false alarms and the misses in full."""
    right, lost = Counter(card.right.values()), Counter(card.missed.values())
    table = Table(
        title="Contradictions found, by kind", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("kind")
    for name in ("pairs", "found", "recall"):
        table.add_column(name, justify="right")
    for kind in CONTRADICTION_KINDS:
        total = right[kind] + lost[kind]
        if total:
            table.add_row(kind.replace("_", " "), str(total), str(right[kind]), f"{right[kind] / total:.2f}")
    total = len(card.right) + len(card.missed)
    table.add_row("all", str(total), str(len(card.right)), f"{card.recall:.2f}", style="bold")
    console.print(table)
    console.print()

    alarms = Counter(kind for kind in card.false.values() if kind is not None)
    table = Table(title="Near-misses, by kind", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("kind")
    for name in ("pairs", "false alarms"):
        table.add_column(name, justify="right")
    for kind in NEAR_MISS_KINDS:
        if card.near_misses[kind]:
            table.add_row(kind.replace("_", " "), str(card.near_misses[kind]), str(alarms[kind]))
    others = sum(1 for kind in card.false.values() if kind is None)
    table.add_row("any other pair", "", str(others))
    table.add_row("all", str(card.near_misses.total()), str(len(card.false)), style="bold")
    console.print(table)
    console.print()

    by_id = {item.id: item for item in feed}
    order = {item.id: number for number, item in enumerate(feed)}
    if card.false:
        console.print("False alarms", style="bold")
        for pair, seeming in card.false.items():
            console.print(_pair_text(pair, seeming or "unlabelled pair", by_id, order, scores.get(pair)))
    if missed and card.missed:
        console.print("Missed", style="bold")
        for pair, kind in card.missed.items():
            console.print(_pair_text(pair, kind, by_id, order, None))
    summary = Text("\n")
    summary.append(f"precision {card.precision:.2f}", style="bold")
    summary.append(f" ({len(card.right)} of {len(card.right) + len(card.false)} reported pairs are labelled), ")
    summary.append(f"recall {card.recall:.2f}", style="bold")
    summary.append(f" ({len(card.right)} of {total} labelled pairs were reported), ")
    summary.append(f"F1 {card.f1:.2f}", style="bold")
    console.print(summary)


def _pair_text(
    pair: Pair, kind: str, by_id: Mapping[str, FeedItem], order: Mapping[str, int], score: float | None
) -> Text:
    text = Text("  ")
    text.append(f"{score:.2f} " if score is not None else "", style="yellow")
    text.append(f"[{kind.replace('_', ' ')}] ", style="dim")
    said = [by_id[name] for name in sorted(pair, key=lambda name: order[name])]
    for position, item in enumerate(said):
        text.append(" | " if position else "", style="dim")
        symbols = ", ".join(f"{key}={value}" for key, value in (item.symbolic_state or {}).items())
        text.append(clean(item.text or symbols))
        if item.text and item.symbolic_state:
            text.append(f" ({symbols})", style="dim")
    return text
