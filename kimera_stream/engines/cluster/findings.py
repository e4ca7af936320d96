"""What an engine has found out about pairs, written under the log's lock where it still holds.

A pair is judged in the newest statements of both, by the owner of the older one's slice, when the log comes to the newer one. If
either states something else by now, or is gone, nothing is written: a later entry leads to the pair again, or nothing is left of
it. A contradiction that is younger than both statements was written for these very statements: it is not written twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from kimera_stream.core.coverage import LockedLog
from kimera_stream.core.interfaces import Judgement, StoredGeoid
from kimera_stream.engines.planning import Planner
from kimera_stream.protocol.objects import Contradiction


@dataclass(frozen=True, slots=True)
class Finding:
    """The word on a pair. ``judgement``: None: the two can both hold. ``final``: the verifier's, which undoes a provisional one."""

    older: StoredGeoid
    newer: StoredGeoid
    judgement: Judgement | None
    final: bool = False

    @property
    def pair(self) -> frozenset[str]:
        return frozenset((self.older.geoid.id, self.newer.geoid.id))


@dataclass(slots=True)
class Written:
    """What became of findings. ``outdated``: either states something else by now."""

    found: int = 0
    confirmed: int = 0
    dissolved: int = 0
    outdated: int = 0


def write_findings(findings: Sequence[Finding], locked: LockedLog, planner: Planner) -> Written:
    """Write into the planner's batch what holds of the findings, in their order."""
    told = Written()
    if not findings:
        return told
    marks = locked.marks(list({geoid_id for finding in findings for geoid_id in finding.pair}))
    standing = _standing(findings, locked)
    for finding in findings:
        if any(
            (mark := marks.get(each.geoid.id)) is None or mark.stated != each.stated
            for each in (finding.older, finding.newer)
        ):
            told.outdated += 1
            continue
        _write(finding, standing, planner, told)
    return told


def _standing(findings: Sequence[Finding], locked: LockedLog) -> dict[frozenset[str], Contradiction]:
    """The newest contradiction of each pair that is open, or that somebody has resolved."""
    wanted = {finding.pair for finding in findings}
    newer = list(dict.fromkeys(finding.newer.geoid.id for finding in findings))
    found: dict[frozenset[str], Contradiction] = {}
    for each in (
        *locked.contradictions_of(newer, state="resolved"),
        *locked.contradictions_of(newer, state="open"),
    ):
        pair = frozenset((each.a, each.b))
        if pair in wanted and (pair not in found or each.offset > found[pair].offset):
            found[pair] = each
    return found


def _write(finding: Finding, standing: dict[frozenset[str], Contradiction], planner: Planner, told: Written) -> None:
    before = standing.get(finding.pair)
    judged = before is not None and before.offset > finding.newer.stated
    if before is not None and before.state == "resolved":
        if judged:
            return  # somebody has decided since: that stands
        before = None
    if judged and not (finding.final and before is not None and before.provisional):
        return
    if finding.judgement is not None:
        found = planner.found(finding.older, finding.newer, finding.judgement, before)
        standing[finding.pair] = found
        if judged:
            told.confirmed += 1
        else:
            told.found += 1
    elif before is not None:
        geoids = [finding.older.geoid, finding.newer.geoid]
        standing.pop(finding.pair)
        planner.dissolved(replace(before, provisional=False) if finding.final else before, geoids)
        told.dissolved += 1
