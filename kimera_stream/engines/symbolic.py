"""Symbolic conflict, exactly as the contract's paragraph of that name defines it."""

from collections.abc import Mapping
from dataclasses import dataclass

from kimera_stream.protocol.objects import RESERVED_SYMBOLS, Scalar


@dataclass(frozen=True, slots=True)
class SymbolicVerdict:
    """How two symbolic states stand to each other.

    Attributes:
        conflicts: (key, value of a, value of b) of each key that both hold with different values; empty if ruled out.
        shared: Number of keys that both hold, reserved ones left out.
        union: Number of keys that either holds, reserved ones left out.
        differing: Number of shared keys with different values, whether or not ruled out.
        same_subject: Both name a subject, and the same one: a conflict is exact evidence.
        apart: Why the statements are about different things or times, in plain words; empty if they are not.
    """

    conflicts: tuple[tuple[str, Scalar, Scalar], ...]
    shared: int
    union: int
    differing: int
    same_subject: bool
    apart: str

    @property
    def opposition(self) -> float:
        """Share of the shared keys in conflict, in [0, 1]."""
        return len(self.conflicts) / self.shared if self.shared else 0.0


def same_value(one: Scalar, other: Scalar) -> bool:
    """Numbers compare by value (1 equals 1.0, but is not true), strings exactly."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    return type(one) is type(other) and one == other


def compare_states(a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> SymbolicVerdict:
    """The verdict on a pair of symbolic states."""
    if not a and not b:  # most statements are text alone
        return _SILENT
    keys_a, keys_b = a.keys() - RESERVED_SYMBOLS, b.keys() - RESERVED_SYMBOLS
    shared = sorted(keys_a & keys_b)
    differing = tuple((key, a[key], b[key]) for key in shared if not same_value(a[key], b[key]))
    apart = _apart(a, b)
    return SymbolicVerdict(
        conflicts=() if apart else differing,
        shared=len(shared),
        union=len(keys_a | keys_b),
        differing=len(differing),
        same_subject=_held_by_both("subject", a, b) and same_value(a["subject"], b["subject"]),
        apart=apart,
    )


def _held_by_both(key: str, a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> bool:
    return a.get(key) is not None and b.get(key) is not None


def _apart(a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> str:
    if _held_by_both("subject", a, b) and not same_value(a["subject"], b["subject"]):
        return f"different subjects: {a['subject']!r} and {b['subject']!r}"
    if _held_by_both("as_of", a, b) and not same_value(a["as_of"], b["as_of"]):
        return f"as of different moments: {a['as_of']!r} and {b['as_of']!r}"
    if not _overlap(a, b):
        return "valid at different times"
    return ""


def _overlap(a: Mapping[str, Scalar], b: Mapping[str, Scalar]) -> bool:
    """Whether the validity periods share a moment. A period is half-open: one that ends where another begins is over."""
    start_a, end_a = _period(a)
    start_b, end_b = _period(b)
    if start_a == start_b:  # also a period without length
        return True
    return start_a < end_b and start_b < end_a


def _period(state: Mapping[str, Scalar]) -> tuple[float, float]:
    start, end = state.get("valid_from"), state.get("valid_to")
    return (
        float(start) if isinstance(start, int | float) else float("-inf"),
        float(end) if isinstance(end, int | float) else float("inf"),
    )


_SILENT = SymbolicVerdict(conflicts=(), shared=0, union=0, differing=0, same_subject=False, apart="")
"""Two states that say nothing."""
