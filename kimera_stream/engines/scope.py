"""Scope: when two statements that clash are nevertheless not a contradiction.

A newer statement that opens by saying that it replaces what was said (``Correction: the gate is shut``) excuses nothing: one of the
two is then outdated, which is what a reader wants to know, and which one is told in the reasons.

A day that is named from where the speaker stands (``yesterday``) is another one when it is said on another day.
"""

import re

OTHER_DAY = 0.2
"""Most that a pair can score whose statements name their day by the same word, said on different days."""
ELSEWHERE = 0.2
"""Most that a pair can score whose statements name other things, times or places and are the same otherwise
(``evidence.elsewhere``)."""
DAY_MS = 86_400_000

_OPENS_BY_REPLACING = re.compile(
    r"^\W*(?:(?:status\s+)?update|correction|corrected|corrigendum|erratum|errata|edit|amendment|amended|revision|revised|"
    r"supersedes|replaces|scratch\s+that)\b\s*(?:\(|\[|\]|:|,|;|\.|-|\u2013|\u2014|#|\bto\b|\bof\b|\bon\b)",
    re.IGNORECASE,
)


def supersedes(newer: str) -> bool:
    """Whether ``newer`` opens by saying that it replaces what was said before."""
    return _OPENS_BY_REPLACING.search(newer) is not None


_DAY = re.compile(
    r"\b(yesterday|today|tomorrow|tonight|last night|this (?:morning|afternoon|evening))\b", re.IGNORECASE
)


def other_day(older: str, older_at: int, newer: str, newer_at: int) -> str:
    """The word by which both name their one day, if it means different days; else empty.

    A day apart at least: then it is another day in every time zone. Different words are left to the verifier, as they may be
    the clash itself ("it was delivered today" / "yesterday"); so are names of weekdays, which mean every week as often as one.

    Args:
        older_at, newer_at: When they were said, unix ms.
    """
    if abs(newer_at - older_at) < DAY_MS:
        return ""
    words = _day_words(older)
    return next(iter(words)) if len(words) == 1 and words == _day_words(newer) else ""


def _day_words(text: str) -> set[str]:
    return {found.group().lower() for found in _DAY.finditer(text)}
