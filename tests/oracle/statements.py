"""What publishers say: statements that clash by their states, by their words, or not at all. The same author with the same
seed says the same things; which of them meet in the log is chance."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.oracle.model import Kind, Ledger, Op

_SYLLABLES = ["bar", "dun", "fel", "gor", "hes", "jil", "kav", "lom", "mur", "nep", "pas", "quo", "rin", "sul", "tev", "vor", "wex", "yab", "zim", "cho"]  # fmt: skip
_PAIRS = [("open", "closed"), ("on", "off"), ("empty", "full"), ("safe", "dangerous"), ("hot", "cold")]
_PER_SUBJECT = 4
"""Statements of one author before the subjects move on: it bounds how many clash."""
_AT_ONCE = 6
"""Subjects spoken of at the same time."""


def _name(rng: Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(3))


def subject_words(seed: int, number: int) -> tuple[str, str, str, tuple[str, str]]:
    """Two made-up names, a made-up kind of thing and a pair of opposites: no two subjects share enough words to be related. Kinds
    that are really there made dozens of others as near as what clashes, and which of them are read is a matter of how many
    engines read: then a serial run finds less.
    """
    rng = Random(f"subject-{seed}-{number}")
    return _name(rng).capitalize(), _name(rng).capitalize(), _name(rng), rng.choice(_PAIRS)


@dataclass
class Author:
    """Makes up operations of one publisher.

    Attributes:
        free: Geoids of its own that nothing is under way on.
        settled: Acknowledged operations that have a key: they may be sent again.
        clashes: Contradictions that its own statements led to and that nobody has resolved.
        named: Its statements name a session; otherwise theirs is the connection's.
        buried: Deleted ones that may be spoken of again.

    A geoid on which a late command may still be under way somewhere is never spoken of again.
    """

    name: str
    seed: int
    ledger: Ledger
    keyed: float = 0.8
    named: bool = False
    said: int = 0
    free: dict[str, None] = field(default_factory=dict)
    settled: list[Op] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    buried: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = Random(f"{self.seed}-{self.name}")

    def next(self) -> Op:
        """A new operation."""
        rng = self._rng
        self.said += 1
        mark = f"{self.name}-{self.said}"
        kind: Kind = "publish"
        target: str | None = None
        body: dict[str, Any] = {}
        draw = rng.random()
        if draw < 0.08 and self.free:
            kind, target = "delete", self._take()
        elif draw < 0.12 and self.clashes:
            kind, target = "resolve", self.clashes.pop(rng.randrange(len(self.clashes)))
            body = {"decision": rng.choice(["collapse", "surge", "buffer"]), "reason": f"settled by {self.name}"}
        else:
            if draw < 0.38 and self.free:
                target = self._take()
            elif draw < 0.42 and self.buried:
                target = self.buried.pop(rng.randrange(len(self.buried)))
            elif draw < 0.92:
                target = mark
            body = self._statement(mark)
        if kind == "publish" and target is not None:
            body["id"] = target
        key = f"key-{mark}" if kind == "publish" and rng.random() < self.keyed else None
        # What names no session belongs to the connection's, and deletes always do.
        session = self.name if self.named and kind == "publish" else ""
        return self.ledger.add(Op(mark, kind, session, target, body, key))

    def again(self) -> Op | None:
        """An operation that was acknowledged long ago, to be sent once more."""
        while self.settled:
            op = self.settled.pop(self._rng.randrange(len(self.settled)))
            if op.era == self.ledger.era:
                return op
        return None

    def answered(self, op: Op) -> None:
        """What an acknowledged operation leaves to be done."""
        if op.kind == "publish":
            assert op.geoid_id is not None
            if op.key is not None or not op.retried:
                self.free[op.geoid_id] = None
            if op.key is not None and self._rng.random() < 0.3:
                self.settled.append(op)
        elif op.kind == "delete" and not op.retried and op.target is not None and self._rng.random() < 0.5:
            self.buried.append(op.target)

    def begin_again(self, living: set[str]) -> None:
        """The log went back to an earlier state, in which only ``living`` are there."""
        self.free = {each: None for each in self.free if each in living}
        self.settled, self.clashes, self.buried = [], [], []

    def _take(self) -> str:
        target = self._rng.choice(list(self.free)[-40:])
        del self.free[target]
        return target

    def _statement(self, mark: str) -> dict[str, Any]:
        rng = self._rng
        number = self.said // _PER_SUBJECT + rng.randrange(_AT_ONCE)
        first, second, kind, opposites = subject_words(self.seed, number)
        body: dict[str, Any] = {"metadata": {"mark": mark}}
        if self.named:
            body["session_id"] = self.name
        shape = rng.random()
        if shape < 0.65:
            body["text"] = self._sentence(first, second, kind, opposites)
        if shape > 0.45:
            body["symbolic_state"] = {
                "subject": f"s-{number}",
                "state": rng.choice(opposites),
                "level": rng.randrange(3),
            }
        if rng.random() < 0.2:
            body["semantic_state"] = {"near": rng.randrange(1, 9) / 8, "far": 0.5}
        if rng.random() < 0.3:
            body["originator_agent_id"] = f"agent-{rng.randrange(4)}"
        return body

    def _sentence(self, first: str, second: str, kind: str, opposites: tuple[str, str]) -> str:
        value = self._rng.choice(opposites)
        form = self._rng.randrange(4)
        if form == 0:
            return f"The {first} {second} {kind} is not {value}."
        if form == 1:
            return f"{first} {second} {kind}: {value}"
        return f"The {first} {second} {kind} is {value}."
