"""What a run came to."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Figures and findings of a run.

    Attributes:
        faults: Done, by kind.
        heard: Events checked, by subscriber.
        meanwhile: Writes refused while a disk was full or slow, or the database locked.
        trimmed: Subscriptions that were told that their position is not kept any more.
        shown: How often a revoked token was shown to a node.
        damage: What became of each damage, in words.
        left_out: Kinds of faults that could not be done, for want of a C compiler.
        violations: Promises broken, in words.
    """

    seed: int
    deployment: str
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    heard: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    closes: Counter[int] = field(default_factory=Counter)
    logs: int = 0
    entries: int = 0
    found: int = 0
    compared: int = 0
    matches: int = 0
    trimmed: int = 0
    shown: int = 0
    meanwhile: int = 0
    damage: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def replay(self) -> str:
        return f"python -m tests.oracle --deployment {self.deployment} --seed {self.seed} --faults {sum(self.faults.values())}"

    def lines(self) -> list[str]:
        """For people."""

        def counts(counter: Counter[str] | Counter[int]) -> str:
            return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items(), key=str)) or "none"

        said = [
            f"oracle: {self.deployment}, seed {self.seed}, {self.seconds:.0f} s, {self.logs} logs with {self.entries:,} entries",
            f"faults: {sum(self.faults.values())} ({counts(self.faults)})",
            f"operations: {counts(self.outcomes)}; repeated answers compared {self.repeats:,}",
            f"events checked: {sum(self.heard.values()):,} ({counts(self.heard)})",
            f"resumes: {self.resumes:,}; positions told to be trimmed {self.trimmed:,}; closes by code: {counts(self.closes)}",
            f"contradictions: {self.found:,} found, {self.compared:,} states of pairs compared with serial runs; "
            f"matches of the watch compared: {self.matches:,}",
            f"revoked tokens shown: {self.shown:,}; writes refused while a disk or a lock kept them: {self.meanwhile:,}",
            f"slowest recovery: {self.slowest[0]:.1f} s after {self.slowest[1] or 'nothing'}",
            *([f"left out, for want of a C compiler: {', '.join(self.left_out)}"] if self.left_out else []),
            *(f"damage: {each}" for each in self.damage),
        ]
        if self.violations:
            said += [f"VIOLATION: {each}" for each in self.violations]
            said.append(f"verdict: {len(self.violations)} violations; to replay: {self.replay}")
        else:
            said.append("verdict: every promise was kept")
        return said
