"""Where two statements part: the words that one has in the place of the other's, for a ``why`` that a person understands."""

import re
from difflib import SequenceMatcher

from kimera_stream.engines.evidence.lexicon import FUNCTION_WORDS, IRREGULAR, NEGATORS, NUMBER_WORDS, stem
from kimera_stream.engines.verifier_text import normal_form

_WORD = re.compile(r"[^\W_]+(?:[-'.:/][^\W_]+)*%?|[%$€£]")
_WORD_OR_PAUSE = re.compile(rf"{_WORD.pattern}|[,;:.!?()]|--|[—–]")
_MOST_WORDS = 60
"""Of each statement are compared: the time grows with the square."""
_MOST_PARTS = 2
_MOST_PHRASES = 3
"""Of what one alone says."""
_LONGEST = 6
"""Words of one part that are shown."""


def differences(older: str, newer: str) -> list[str]:
    """At most two parts, as ``"'open' vs 'closed'"``; a part that only one has is ``"only in the newer: 'no longer'"``.

    Where hardly any word is shared nothing stands in the place of anything: then what each says that the other does not, as
    ``"only in the older: 'shutters are down', 'staff have gone home'"``. Words are told as they were written; ``two hours`` and
    ``120 min``, one value to the verifier, do not differ. Empty where no word does.
    """
    one, other = _WORD.findall(older)[:_MOST_WORDS], _WORD.findall(newer)[:_MOST_WORDS]
    matcher = SequenceMatcher(None, [word.lower() for word in one], [word.lower() for word in other], autojunk=False)
    if matcher.ratio() < 0.3:
        return _apart(older, newer)
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


def _apart(older: str, newer: str) -> list[str]:
    sides = (("older", _alone(older, newer)), ("newer", _alone(newer, older)))
    return [f"only in the {side}: {', '.join(map(_told, phrases))}" for side, phrases in sides if phrases]


def _alone(text: str, other: str) -> list[list[str]]:
    """The first phrases of ``text`` that hold no word of meaning, and no value, which ``other`` holds."""
    known = {stem(word.lower()) for word in _WORD.findall(other) if not _grammar(word)}
    values = f" {' '.join(_WORD.findall(normal_form(other)))} "
    tokens = _WORD_OR_PAUSE.findall(text)[:_MOST_WORDS]
    phrases: list[list[str]] = [[]]
    place = 0
    while place < len(tokens):
        token = tokens[place]
        held = _value(tokens[place : place + 2], values) if token[0].isdigit() or token.lower() in NUMBER_WORDS else 0
        if held or _WORD.fullmatch(token) is None or (not _grammar(token) and stem(token.lower()) in known):
            phrases.append([])
        else:
            phrases[-1].append(token)
        place += max(1, held)
    return [each for each in map(_trimmed, phrases) if each][:_MOST_PHRASES]


def _value(words: list[str], values: str) -> int:
    """How many of the words are a value, "two hours", that the other statement names as well, in its own way."""
    for count in range(len(words), 0, -1):
        written = normal_form(" ".join(words[:count]))
        if any(letter.isdigit() for letter in written) and f" {written} " in values:
            return count
    return 0


def _trimmed(phrase: list[str]) -> list[str]:
    """Without the words of grammar at both ends."""
    meant = [place for place, word in enumerate(phrase) if not _grammar(word)]
    return phrase[meant[0] : meant[-1] + 1] if meant else []


def _grammar(word: str) -> bool:
    lowered = word.lower()
    return lowered not in NEGATORS and (lowered in FUNCTION_WORDS or IRREGULAR.get(lowered) in FUNCTION_WORDS)


def _told(words: list[str]) -> str:
    shown = " ".join(words[:_LONGEST])
    return f"'{shown} ...'" if len(words) > _LONGEST else f"'{shown}'"
