"""What each stage of the cascade said of one pair, for the person who asks."""

from collections.abc import Sequence
from dataclasses import dataclass

from kimera_stream.protocol.objects import StageReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a pair met on its way.

    Attributes:
        worthy: The scan would have handed it on. ``least``: the cosine that this takes.
        conflicts: Symbolic keys with different values. ``apart``: why the states rule the pair out; else empty.
        texts: Both have one.
        rules: Probability by the rules.
        prefilter: The stage is on. ``chosen``: it would have handed the pair on.
        silent: Why the verifier has no word; empty where ``verified`` is its probability.
        scope: The stage is on. ``textual``: probability after it; ``out_of_scope``: the most it allows, and why.
        score: Over all. ``bar``: what it takes to be reported.
    """

    worthy: bool
    cosine: float | None
    least: float
    conflicts: int
    apart: str
    texts: bool
    rules: float | None
    prefilter: bool
    chosen: bool
    silent: str
    verified: float | None
    model: str
    scope: bool
    textual: float
    out_of_scope: tuple[float, str] | None
    score: float
    bar: float


def reports(heard: Heard, took: Sequence[float]) -> list[StageReport]:
    """The stages in their order; ``took``: milliseconds of each, told of those that ran."""
    scan, rules, prefilter, verify, scope, threshold = took
    off = "switched off by scoring.stages"
    limited = heard.out_of_scope if heard.scope else None
    return [
        StageReport(
            stage="scan", ran=True, passed=heard.worthy, value=_rounded(heard.cosine), ms=scan, note=_scanned(heard)
        ),
        StageReport(stage="rules", ran=heard.texts, value=_rounded(heard.rules), ms=rules if heard.texts else None),
        StageReport(
            stage="prefilter",
            ran=heard.prefilter,
            passed=heard.chosen if heard.prefilter else None,
            ms=prefilter if heard.prefilter else None,
            note="a pair that is asked about is read in any case" if heard.prefilter else off,
        ),
        StageReport(
            stage="verify",
            ran=heard.verified is not None,
            value=_rounded(heard.verified),
            ms=verify if heard.verified is not None else None,
            note=heard.silent or heard.model,
        ),
        StageReport(
            stage="scope",
            ran=heard.scope,
            value=_rounded(heard.textual),
            ms=scope if heard.scope else None,
            note=(limited[1] if limited else "") if heard.scope else off,
        ),
        StageReport(
            stage="threshold", ran=True, passed=heard.score >= heard.bar, value=_rounded(heard.bar), ms=threshold
        ),
    ]


def _scanned(heard: Heard) -> str:
    if heard.apart:
        return f"not compared: {heard.apart}"
    if heard.conflicts:
        return "symbolic states differ" if heard.worthy else "symbolic states differ, of unrelated statements"
    if heard.cosine is None:
        return "there are not two vectors to compare"
    return "" if heard.worthy else f"not related: the cosine is below {heard.least:g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
