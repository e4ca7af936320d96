"""Where two statements part: the words that one has in the place of the other's, for a ``why`` that a person understands."""

import re
from difflib import SequenceMatcher

from kimera_stream.engines.verifier_text import normal_form

_WORD = re.compile(r"[^\W_]+(?:[-'.:/][^\W_]+)*%?|[%$€£]")
_MOST_WORDS = 60
"""Of each statement are compared: the time grows with the square."""
_MOST_PARTS = 2
_LONGEST = 6
"""Words of one part that are shown."""


def differences(older: str, newer: str) -> list[str]:
    """At most two parts, as ``"'open' vs 'closed'"``; a part that only one has is ``"only in the newer: 'no longer'"``.

    Words are told as they were written; ``two hours`` and ``120 min``, one value to the verifier, do not differ. Empty where no word does,
    or where hardly any is shared: then the statements as a whole are the difference.
    """
    one, other = _WORD.findall(older)[:_MOST_WORDS], _WORD.findall(newer)[:_MOST_WORDS]
    matcher = SequenceMatcher(None, [word.lower() for word in one], [word.lower() for word in other], autojunk=False)
    if matcher.ratio() < 0.3:
        return []
    parts: list[str] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        left, right = _told(one[a:b]), _told(other[c:d])
        if kind == "replace" and normal_form(" ".join(one[a:b])) == normal_form(" ".join(other[c:d])):
            continue
        if kind == "replace":
            parts.append(f"{left} vs {right}")
        elif kind == "delete":
            parts.append(f"only in the older: {left}")
        elif kind == "insert":
            parts.append(f"only in the newer: {right}")
    parts.sort(key=lambda part: " vs " not in part)  # what stands in each other's place says most
    return parts[:_MOST_PARTS]


def _told(words: list[str]) -> str:
    shown = " ".join(words[:_LONGEST])
    return f"'{shown} ...'" if len(words) > _LONGEST else f"'{shown}'"
