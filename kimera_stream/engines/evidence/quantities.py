"""Numbers, units, times and dates as they are written, brought to comparable values."""

import re
from dataclasses import dataclass

from kimera_stream.engines.evidence.lexicon import MONTHS, MULTIPLIERS, NUMBER_WORDS, ORDINALS, UNITS, WEEKDAYS, stem

INFINITE = float("inf")


@dataclass(frozen=True, slots=True)
class Quantity:
    """What one expression says of a quantity.

    Attributes:
        dimension: What is measured (``time``, ``data``, ``clock``, ``date``, ``weekday``, ``year``, ...), or ``count``.
        low: Least value in the base unit.
        high: Greatest value; equal to ``low`` for an exact one.
        context: Stem of the thing counted, for ``count``; empty otherwise.
        text: As written.
        approximate: "about", "roughly", "almost".
    """

    dimension: str
    low: float
    high: float
    context: str
    text: str
    approximate: bool = False

    def agrees(self, other: "Quantity") -> bool:
        """Whether both can hold of one thing."""
        slack = 0.1 if self.approximate or other.approximate else 0.006
        if self.dimension in _CALENDAR:
            slack = 0.0
        reach = slack * max(
            (abs(value) for value in (self.low, self.high, other.low, other.high) if abs(value) != INFINITE),
            default=0.0,
        )
        return self.low <= other.high + reach and other.low <= self.high + reach


DIGIT = re.compile(r"\d")
_RUN = re.compile(r"\w+")
_NAMED = frozenset({"noon", "midnight", "midday", *ORDINALS, *WEEKDAYS, *MONTHS})
_SPOKEN = (*NUMBER_WORDS, "hundred", "thousand", "million", "billion")
_SPOKEN_STARTS = frozenset(word[:4] for word in _SPOKEN)
_SHORT_STARTS = frozenset(word for word in _SPOKEN if len(word) == 3)
_CALENDAR = frozenset({"clock", "date", "weekday", "year", "month"})

_CLOCK = re.compile(
    r"\b(\d{1,2})(?::(\d{2})|\.(\d{2})(?=\s*[ap]\.?m\b))?(?::\d{2})?\s*(a\.?m\.?|p\.?m\.?|o'clock)?(?![\d:.])",
    re.IGNORECASE,
)
_ISO_DATE = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_MONTH_NAMES = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY_MONTH = re.compile(
    rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({_MONTH_NAMES})\b\.?(?:,?\s+(\d{{4}}))?", re.IGNORECASE
)
_MONTH_DAY = re.compile(
    rf"\b({_MONTH_NAMES})\b\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)(?:,?\s+(\d{{4}}))?", re.IGNORECASE
)
_YEAR = re.compile(r"\b(1[6-9]\d\d|20\d\d)\b(?!\s*(?:%|[a-z]))", re.IGNORECASE)
_YEAR_LEAD = re.compile(
    r"(?:\bin|\bsince|\bof|\bby|\buntil|\bfrom|\bfor|\byear|\bto|\bduring|\bbefore|\bafter|,|\()\s*$", re.IGNORECASE
)
_NUMBER = re.compile(
    r"(?<![\w.])([$€£¥])?(-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?)\s?(%|°\s?c\b|km/h|m/s)?(?:[\s-]?([a-z]+))?",
    re.IGNORECASE,
)
_WORD_NUMBER = re.compile(
    r"\b((?:(?:" + "|".join(sorted(set(NUMBER_WORDS) | {"hundred", "thousand", "million", "billion"}, key=len, reverse=True))
    + r")(?:[\s-]+(?:and\s+)?(?=\w))?)+)(?:\s*([a-z]+))?",
    re.IGNORECASE,
)  # fmt: skip
_AT_LEAST = re.compile(r"(?:at least|no fewer than|no less than|minimum of|minimum|from)\s*$", re.IGNORECASE)
_MORE = re.compile(
    r"(?:more than|over|above|exceed(?:s|ed|ing)?|greater than|beyond|upwards of|north of)\s*$", re.IGNORECASE
)
_AT_MOST = re.compile(
    r"(?:at most|no more than|not more than|up to|maximum of|maximum|no later than|not exceed(?:ing)?|within|capped at)\s*$",
    re.IGNORECASE,
)
_LESS = re.compile(r"(?:less than|fewer than|under|below|short of)\s*$", re.IGNORECASE)
_ABOUT = re.compile(r"(?:about|around|roughly|approximately|approx\.?|almost|nearly|some|circa|~)\s*$", re.IGNORECASE)
_NAMES_BEFORE = re.compile(
    r"(?:\b(?:flight|gate|room|release|version|ticket|row|platform|line|chapter|page|route|bus|channel|section|article|"
    r"ward|bed|bay|unit|track|step|phase|stage|floor|level|building|invoice|order|case|table|figure|item|number|no\.|port|"
    r"error|code|lane|terminal|zone|pump|valve|tank|lot|batch|cell|grade|class|highway|road|apartment|flat|suite)|#)\s*$",
    re.IGNORECASE,
)
"""Words after which a number is a name, not an amount."""


def quantities(text: str) -> tuple[list[Quantity], list[str], str]:
    """What ``text`` says in numbers.

    Returns:
        The quantities; numbers used as names ("flight 612" gives "flight 612"); and ``text`` with all of them blanked,
        character for character, so that what remains can be read as words.
    """
    words = words_of(text)
    if words is not None and not DIGIT.search(text) and not _counted(words):
        return [], [], text  # as most texts
    reader = _Reader(text)
    reader.dates()
    reader.clocks()
    reader.numbers()
    reader.words()
    return reader.found, reader.names, "".join(reader.rest)


def words_of(text: str) -> frozenset[str] | None:
    """The words of a text in small letters; None where other letters than ASCII are there, whose capitals are another matter."""
    return frozenset(_RUN.findall(text.lower())) if text.isascii() else None


def _counted(words: frozenset[str]) -> bool:
    """Whether one of the words names a number or a moment, or begins as if it did ("tenant")."""
    return not _NAMED.isdisjoint(words) or any(
        word[:4] in _SPOKEN_STARTS or word[:3] in _SHORT_STARTS for word in words
    )


class _Reader:
    def __init__(self, text: str) -> None:
        self.found: list[Quantity] = []
        self.names: list[str] = []
        self.rest = list(text)

    def _text(self) -> str:
        return "".join(self.rest)

    def _blank(self, start: int, end: int) -> None:
        self.rest[start:end] = " " * (end - start)

    def _add(self, dimension: str, value: float, written: str, context: str = "", high: float | None = None) -> None:
        self.found.append(Quantity(dimension, value, value if high is None else high, context, written.strip()))

    def dates(self) -> None:
        for pattern in (_ISO_DATE, _DAY_MONTH, _MONTH_DAY):
            text = self._text()
            for match in pattern.finditer(text):
                if pattern is _ISO_DATE:
                    year, month, day = (int(group) for group in match.groups())
                else:
                    first, second, third = match.groups()
                    number, name = (first, second) if pattern is _DAY_MONTH else (second, first)
                    day, month, year = int(number), MONTHS[name.lower()], int(third) if third else 0
                    if name == "may" and pattern is _MONTH_DAY and match.group(1).islower():
                        continue  # "may 5 people join" is no date
                if not (1 <= day <= 31 and 1 <= month <= 12):
                    continue
                self._add("date", month * 100 + day, match.group().rstrip("., "))
                if year:
                    self._add("year", year, str(year))
                self._blank(*match.span())

    def clocks(self) -> None:
        for match in _CLOCK.finditer(self._text()):
            hours, minutes, dotted, suffix = match.groups()
            if minutes is None and suffix is None:
                continue
            hour, minute = int(hours), int(minutes or dotted or 0)
            if hour > 24 or minute > 59:
                continue
            half = (suffix or "").lower()[:1]
            if half == "p" and hour < 12:
                hour += 12
            elif half == "a" and hour == 12:
                hour = 0
            self._add("clock", hour * 60 + minute, match.group())
            self._blank(*match.span())
        text = self._text()
        for word, minutes_of_day in (("noon", 720), ("midnight", 0), ("midday", 720)):
            for match in re.finditer(rf"\b{word}\b", text, re.IGNORECASE):
                self._add("clock", minutes_of_day, word)
                self._blank(*match.span())

    def numbers(self) -> None:
        text = self._text()
        for match in _NUMBER.finditer(text):
            sign, digits, mark, word = match.groups()
            before = text[max(0, match.start() - 24) : match.start()]
            end = match.end(2)
            value = float(digits.replace(",", ""))
            if sign is None and mark is None and _NAMES_BEFORE.search(before):
                name = before.split()[-1] if before.split() else ""
                self.names.append(f"{name} {digits}".lower())
                self._blank(match.start(2), end)
                continue
            if (
                sign is None and mark is None and len(digits) == 4 and _YEAR.match(text, match.start(2))
                and (word is None or _YEAR_LEAD.search(before)) and "." not in digits
            ):  # fmt: skip
                self._add("year", value, digits)
                self._blank(match.start(2), end)
                continue
            if word and word.lower() in ("st", "nd", "rd", "th"):
                self._add("ordinal", value, digits + word)
                self._blank(match.start(2), match.end(4))
                continue
            unit = sign or mark or word or ""
            if (
                word
                and word.lower() in MULTIPLIERS
                and (sign or word.lower() not in ("k", "m") or text[match.end(2)] != " ")
            ):
                value *= MULTIPLIERS[word.lower()]
                end = match.end(4)
                after = re.match(r"\s+([a-z]+)", text[end:], re.IGNORECASE)
                unit = sign or (after.group(1) if after else "")
            self._measured(value, unit, before, text[match.start() : max(end, match.end(3) if mark else end)])
            self._blank(match.start(), max(end, match.end(3) if mark else end))

    def words(self) -> None:
        text = self._text()
        for match in _WORD_NUMBER.finditer(text):
            written, word = match.groups()
            value = _spoken(written)
            lowered = written.strip().lower()
            if value is None or lowered in ("one", "third", "half", "single", "couple", "second"):
                continue  # mostly no amounts: "one of", "the third", "half asleep"
            before = text[max(0, match.start() - 24) : match.start()]
            self._measured(value, word or "", before, written)
            self._blank(match.start(1), match.end(1))
        for match in re.finditer(r"\b[a-z]+\b", self._text(), re.IGNORECASE):
            lowered = match.group().lower()
            if lowered in ORDINALS and lowered != "second":
                self._add("ordinal", ORDINALS[lowered], lowered)
            elif (
                lowered in WEEKDAYS
                and (len(lowered) > 4 or match.group()[0].isupper())
                and lowered not in ("sun", "wed", "sat")
            ):
                self._add("weekday", WEEKDAYS[lowered], match.group())
            elif lowered in MONTHS and len(lowered) > 3 and (lowered != "march" or match.group()[0].isupper()):
                self._add("month", MONTHS[lowered], match.group())
            else:
                continue
            self._blank(*match.span())

    def _measured(self, value: float, unit: str, before: str, written: str) -> None:
        lowered = unit.lower().replace(" ", "")
        known = UNITS.get(unit) or UNITS.get(lowered) or UNITS.get(lowered.removesuffix("s"))
        if known is not None:
            dimension, factor = known
            value, context = value * factor, ""
            written = f"{written.strip()} {unit}".replace(f"{unit} {unit}", unit) if unit not in written else written
            if dimension == "months" and factor == 1 and value == 0:
                dimension = "time"
        else:
            dimension, context = "count", stem(unit) if unit else ""
        low = high = value
        if _AT_MOST.search(before) or _LESS.search(before):
            low = -INFINITE
        elif _AT_LEAST.search(before) or _MORE.search(before):
            high = INFINITE
        self.found.append(
            Quantity(dimension, low, high, context, written.strip(), approximate=_ABOUT.search(before) is not None)
        )


def _spoken(written: str) -> float | None:
    """Value of "twenty-five" or "two hundred and six"; None if the words are no number."""
    total, current, seen = 0.0, 0.0, False
    for word in re.split(r"[\s-]+", written.strip().lower()):
        if word in ("and", ""):
            continue
        if word in NUMBER_WORDS:
            factor = NUMBER_WORDS[word]
            current = current * 12 if word == "dozen" and current else current + factor
        elif word == "hundred":
            current = (current or 1) * 100
        elif word in MULTIPLIERS:
            total += (current or 1) * MULTIPLIERS[word]
            current = 0
        else:
            return None
        seen = True
    return total + current if seen else None
