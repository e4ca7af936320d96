"""Statements as somebody else would say them again: another frame, other marks, a contraction, an abbreviation, another order."""

import random
import re
from collections.abc import Callable, Sequence
from functools import cache

Change = Callable[[random.Random, str], str]
"""``text`` in other words of the same meaning; unchanged where the change does not apply."""

_BEFORE = (
    "FYI: ", "FYI, ", "Note: ", "Please note: ", "Again: ", "Once again: ", "Once more: ", "Reminder: ", "Just a reminder: ", "Heads-up: ",
    "As said, ", "As mentioned, ", "As I said, ", "As already reported, ", "To repeat: ", "Just to confirm: ", "Confirmed: ", "I can confirm: ",
    "For the record, ", "For your information: ", "Same as before: ", "Status: ", "Info: ", "Yes, ", "Indeed, ", "OK, so ", "Hi all, ", "Team, ", "Right, ",
    "Just so everyone knows, ", "In case you missed it: ", "It is true that ", "We know that ", "RE: ", "[repeat] ", "(again) ",
)  # fmt: skip
_AFTER = (
    ", as said", ", as mentioned", ", as reported before", " (again)", " (confirmed)", " (repeat)", ", FYI", " - FYI", ", just so you know",
    ", to repeat", ", as before", ", as already noted", ", by the way", ", I can confirm", ", for the record", ", yes", ", thanks",
)  # fmt: skip
_OPENERS = frozenset({"the", "a", "an", "it", "this", "that", "these", "those", "there", "we", "they", "he", "she", "all", "no", "nobody", "none", "every", "each", "some", "only", "our", "their", "his", "her", "my", "your", "both", "most", "at", "in", "on", "from", "after", "before", "since", "until", "by"})  # fmt: skip
_CONTRACTIONS = (
    ("is not", "isn't"), ("are not", "aren't"), ("was not", "wasn't"), ("were not", "weren't"), ("does not", "doesn't"), ("do not", "don't"),
    ("did not", "didn't"), ("has not", "hasn't"), ("have not", "haven't"), ("will not", "won't"), ("cannot", "can't"), ("must not", "mustn't"),
    ("should not", "shouldn't"), ("it is", "it's"), ("there is", "there's"), ("they are", "they're"), ("we are", "we're"), ("we have", "we've"),
    ("that is", "that's"), ("it will", "it'll"), ("they will", "they'll"), ("we will", "we'll"),
)  # fmt: skip
_SHORT = (
    ("and", "&"), ("percent", "%"), ("per cent", "%"), ("minutes", "min"), ("hours", "h"), ("seconds", "s"), ("kilometres", "km"), ("kilometers", "km"),
    ("metres", "m"), ("kilograms", "kg"), ("degrees", "deg"), ("approximately", "approx."), ("about", "around"), ("information", "info"),
    ("application", "app"), ("department", "dept."), ("temperature", "temp"), ("maximum", "max"), ("minimum", "min"), ("without", "w/o"),
    ("meeting", "mtg"), ("appointment", "appt"), ("number", "no."), ("street", "St."), ("database", "DB"),
    ("production", "prod"), ("version", "v"), ("management", "mgmt"), ("government", "govt"), ("professor", "prof."), ("doctor", "Dr"),
    ("Monday", "Mon"), ("Tuesday", "Tue"), ("Wednesday", "Wed"), ("Thursday", "Thu"), ("Friday", "Fri"), ("Saturday", "Sat"), ("Sunday", "Sun"),
    ("January", "Jan"), ("February", "Feb"), ("August", "Aug"), ("September", "Sept"), ("October", "Oct"), ("November", "Nov"), ("December", "Dec"),
    ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"), ("six", "6"), ("seven", "7"), ("eight", "8"), ("nine", "9"), ("ten", "10"),
    ("begins", "starts"), ("began", "started"), ("every day", "daily"), ("every week", "weekly"), ("at present", "currently"), ("a.m.", "am"),
    ("photograph", "photo"), ("telephone", "phone"), ("laboratory", "lab"), ("because", "since"),
    ("big", "large"), ("buy", "purchase"), ("almost", "nearly"), ("OK", "fine"), ("roughly", "around"), ("currently", "at the moment"),
)  # fmt: skip
_ONE_WAY = frozenset({"m", "s", "h", "v", "since", "no.", "min", "fine", "St.", "around", "max", "temp", "Dr"})
"""Short forms that stand for several things, or are a word of their own."""
_WHEN = (
    r"(?:at|on|in|since|until|by|from|after|before) (?:the (?:morning|afternoon|evening)|noon|midnight|early \w+|late \w+|\d(?:[\w:.]*\w)?(?: \w+)?"
    r"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day(?: \w+)?"
    r"|(?:January|February|March|April|May|June|July|August|September|October|November|December)(?: \d+)?)"
    r"|yesterday|today|tomorrow|tonight|last (?:week|month|year|night)|this (?:week|morning|afternoon|year)"
)
_LAST_WHEN = re.compile(rf"^(?P<rest>[^,;:]+) (?P<when>{_WHEN})(?P<dot>\.?)$")
_FIRST_WHEN = re.compile(rf"^(?P<when>{_WHEN}),? (?P<rest>[^,;:]+?)(?P<dot>\.?)$", re.IGNORECASE)
_TIMED = re.compile(
    r"\b(?:now|still|not|never|no|longer|until|since|yet|already|always|was|were|will|would|going|ago|yesterday|tomorrow|last|next|from|if|when)\b|n't",
    re.IGNORECASE,
)
_PASSIVE = re.compile(
    r"\b(has been|have been|was|were) (\w+ed|sent|sold|paid|shut|built|made|found|taken|given|chosen|written|broken|cut|won|lost)\b"
)
_PAST = re.compile(r"\b(?:since|for|until|ago|yesterday|last|in|on|at|when|while|ever|never|not|by|this)\b|\d")
_TELEGRAPH = re.compile(r"\b(?:the|a|an|is|are|has been|have been) ", re.IGNORECASE)
_PRESENT = re.compile(r"\b(is|are) (?!it\b|there\b|they\b|this\b|that\b)")


def _opened_low(text: str) -> str:
    return text[:1].lower() + text[1:] if text.partition(" ")[0].lower() in _OPENERS else text


def _opened_high(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unstopped(text: str) -> tuple[str, str]:
    bare = text.rstrip(".!")
    return bare, text[len(bare) :]


def _before(rng: random.Random, text: str) -> str:
    return rng.choice(_BEFORE) + (_opened_low(text) if rng.random() < 0.7 else text)


def _after(rng: random.Random, text: str) -> str:
    bare, stop = _unstopped(text)
    return f"{bare}{rng.choice(_AFTER)}{stop}"


def _marks(rng: random.Random, text: str) -> str:
    bare, stop = _unstopped(text)
    return rng.choice(
        (
            text.lower(),
            bare if stop else f"{text}.",
            f"{bare}!",
            re.sub(r"\b(?:the|an?) ", "", text, flags=re.IGNORECASE),
        )
    )


def _told_short(rng: random.Random, text: str) -> str:
    short = _TELEGRAPH.sub("", text)
    return _opened_high(short) if rng.random() < 0.5 else _unstopped(short)[0]


_FULL_OR_NOT = [
    (change(old), change(new))
    for pair in _CONTRACTIONS
    for old, new in (pair, pair[::-1])
    for change in (str, _opened_high)
]
_LONG_OR_SHORT = [(old, new) for pair in _SHORT for old, new in (pair, pair[::-1]) if old not in _ONE_WAY]


def _swapped(rng: random.Random, text: str, table: Sequence[tuple[str, str]]) -> str:
    """``text`` with one of its words that are in the table said in the other way."""
    found = [pair for pair in table if pair[0] in text and _whole(pair[0]).search(text)]
    if not found:
        return text
    old, new = rng.choice(found)
    return _whole(old).sub(lambda _: new, text, count=1)


@cache
def _whole(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.,:/-]){re.escape(words)}(?![\w:/-]|[.,]\d)")


def _contracted(rng: random.Random, text: str) -> str:
    return _swapped(rng, text, _FULL_OR_NOT)


def _abbreviated(rng: random.Random, text: str) -> str:
    return _swapped(rng, text, _LONG_OR_SHORT)


def _ordered(_: random.Random, text: str) -> str:
    if found := _LAST_WHEN.match(text):
        return f"{_opened_high(found['when'])}, {_opened_low(found['rest'])}{found['dot']}"
    if found := _FIRST_WHEN.match(text):
        return f"{_opened_high(found['rest'])} {found['when'][:1].lower()}{found['when'][1:]}{found['dot']}"
    return text


def _still(_: random.Random, text: str) -> str:
    """What is, is still: said of the present alone."""
    return _PRESENT.sub(r"\1 still ", text) if _is_present(text) else text


def _now(rng: random.Random, text: str) -> str:
    if not _is_present(text):
        return text
    bare, stop = _unstopped(text)
    word = rng.choice(("now", "currently", "right now", "at the moment", "at present"))
    return rng.choice(
        (_PRESENT.sub(rf"\1 {word} ", text), f"{bare} {word}{stop}", f"{_opened_high(word)} {_opened_low(text)}")
    )


def _is_present(text: str) -> bool:
    return len(_PRESENT.findall(text)) == 1 and not _TIMED.search(text) and not re.search("[,;:?]", text)


def _done(_: random.Random, text: str) -> str:
    """What has been done was done, where no time is told."""
    found = _PASSIVE.search(text)
    if found is None or _PAST.search(text):
        return text
    other = {"has been": "was", "have been": "were", "was": "has been", "were": "have been"}[found[1]]
    return f"{text[: found.start()]}{other} {found[2]}{text[found.end() :]}"


FRAMES: tuple[Change, ...] = (_before, _after, _marks, _contracted, _abbreviated, _still)
"""What says as much against another statement as before."""
CHANGES: tuple[Change, ...] = (
    _before,
    _after,
    _marks,
    _told_short,
    _contracted,
    _abbreviated,
    _ordered,
    _still,
    _now,
    _done,
)


def reworded(rng: random.Random, text: str, changes: Sequence[Change] = CHANGES) -> str:
    """``text`` with one to three of the changes that apply, in any order."""
    left, changed = rng.choice((1, 1, 2, 3)), text
    for change in rng.sample(changes, len(changes)):
        if left and (other := change(rng, changed)) != changed:
            changed, left = other, left - 1
    return changed
