"""One way to write numbers, times, durations, quantities and dates, so that the verifier compares values and not spellings.

A model of six layers cannot do arithmetic: it is told. ``"two hours"``, ``"2 h"`` and ``"120 min"`` all become ``"2 hours"``,
``"half past eight in the evening"`` becomes ``"20:30"``, ``"March 3rd"`` and ``"2026-03-03"`` share ``"3 march"``. The
result is for the model alone and is never shown; a phrase that is not recognised is left as it is.
"""

import re
from decimal import Decimal
from typing import Final

_ONES: Final = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
}
_TENS: Final = {
    word: value * 10
    for value, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2
    )
}
_SCALES: Final = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_SMALL = "|".join([*_TENS, *sorted(_ONES, key=len, reverse=True)])
_NUMBER_WORDS: Final = re.compile(
    rf"(?<![\w-])(?:{_SMALL})(?:[\s-]+(?:and\s+)?(?:{_SMALL}|{'|'.join(_SCALES)}))*(?![\w])", re.IGNORECASE
)
_PRONOUN_BEFORE: Final = re.compile(
    r"\b(?:no|any|every|some|each|this|that|which|the|another|last|next|only)[\s-]+$", re.IGNORECASE
)

_MINUTES: Final = {
    "five": 5,
    "ten": 10,
    "quarter": 15,
    "a quarter": 15,
    "twenty": 20,
    "twenty-five": 25,
    "twenty five": 25,
    "half": 30,
    "eighteen": 18,
}
_HOURS = "|".join(list(_ONES)[1:13]) + "|1[0-2]|[1-9]"
_DAYTIME = r"(?:\s+in\s+the\s+(?P<part>morning|afternoon|evening)|\s+(?P<night>at\s+night|tonight))?"
_SPOKEN_CLOCK: Final = re.compile(
    rf"\b(?P<lead>at|by|until|till|since|from|before|after|around|about|past)?(?P<gap>\s*)\b"
    rf"(?P<minutes>a quarter|quarter|half|twenty[- ]five|twenty|eighteen|ten|five)\s+(?P<side>past|to)\s+(?P<hour>{_HOURS})\b"
    + _DAYTIME,
    re.IGNORECASE,
)
_CLOCK: Final = re.compile(
    r"(?<![\d.:])(?P<hour>[01]?\d|2[0-3])(?:[:.](?P<minute>[0-5]\d))?\s*(?P<half>a\.?m\.?|p\.?m\.?)(?![\w])",
    re.IGNORECASE,
)
_CLOCK_24: Final = re.compile(r"(?<![\d.:])(?P<hour>\d):(?P<minute>[0-5]\d)(?![\d:])")
_OCLOCK: Final = re.compile(rf"\b(?P<hour>{_HOURS})\s+o['’]?clock\b" + _DAYTIME, re.IGNORECASE)

_UNIT_TABLE: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    # family: (name, factor to the family's base, spellings), largest first; a value is told in the largest that is exact
    "time": (
        ("weeks", "604800", r"weeks?|wks?"),
        ("days", "86400", r"days?"),
        ("hours", "3600", r"hours?|hrs?|(?-i:h)"),
        ("minutes", "60", r"minutes?|mins?"),
        ("seconds", "1", r"seconds?|secs?|(?-i:s)"),
        ("milliseconds", "0.001", r"milliseconds?|millis|ms"),
    ),
    "months": (("years", "12", r"years?|yrs?"), ("months", "1", r"months?|mths?")),
    "mass": (
        ("tonnes", "1000000", r"tonnes?|metric\s+tons?"),
        ("kg", "1000", r"kilograms?|kilos?|kg"),
        ("g", "1", r"grams?|(?-i:g)"),
        ("mg", "0.001", r"milligrams?|mg"),
    ),
    "length": (
        ("km", "1000000", r"kilomet(?:re|er)s?|km"),
        ("m", "1000", r"met(?:re|er)s?|(?-i:m)"),
        ("cm", "10", r"centimet(?:re|er)s?|cm"),
        ("mm", "1", r"millimet(?:re|er)s?|mm"),
    ),
    "volume": (
        ("litres", "1000", r"lit(?:re|er)s?|(?-i:[lL])"),
        ("ml", "1", r"millilit(?:re|er)s?|ml"),
    ),
    "data": (
        ("tb", "1000000000", r"terabytes?|tb"),
        ("gb", "1000000", r"gigabytes?|gigs?|gb"),
        ("mb", "1000", r"megabytes?|mb"),
        ("kb", "1", r"kilobytes?|kb"),
    ),
    "power": (("mw", "1000000", r"megawatts?|mw"), ("kw", "1000", r"kilowatts?|kw"), ("w", "1", r"watts?")),
}
_UNITS: Final = [
    (family, name, Decimal(factor), re.compile(rf"(?:{spellings})\Z", re.IGNORECASE))
    for family, rows in _UNIT_TABLE.items()
    for name, factor, spellings in rows
]
_SPELLINGS = "|".join(sorted((row[2] for rows in _UNIT_TABLE.values() for row in rows), key=len, reverse=True))
_QUANTITY: Final = re.compile(
    rf"(?<![\w.,:/$€£#-])(?P<value>\d+(?:\.\d+)?)(?:\s+|-)?(?P<unit>{_SPELLINGS})(?![\w/°-])", re.IGNORECASE
)
_THOUSANDS: Final = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_SCALED: Final = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(k|thousand|million|mn|billion|bn)(?![\w])", re.IGNORECASE)
_SCALE_OF: Final = {
    "k": 1_000,
    "thousand": 1_000,
    "million": 1_000_000,
    "mn": 1_000_000,
    "billion": 1_000_000_000,
    "bn": 1_000_000_000,
}

_MONTHS: Final = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH = "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
_DAY_MONTH: Final = re.compile(rf"\b(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\s+(?:of\s+)?({_MONTH})\b\.?", re.IGNORECASE)
_MONTH_DAY: Final = re.compile(
    rf"\b({_MONTH})\.?\s+(?:the\s+)?(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\b(?![:.]\d)", re.IGNORECASE
)
_ISO_DATE: Final = re.compile(r"\b((?:19|20)\d\d)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\b")
_WEEKDAYS: Final = {
    "mon": "Monday",
    "tue": "Tuesday",
    "tues": "Tuesday",
    "wed": "Wednesday",
    "thu": "Thursday",
    "thur": "Thursday",
    "thurs": "Thursday",
    "fri": "Friday",
}
_WEEKDAY: Final = re.compile(r"\b(Mon|Tues?|Wed|Thu(?:rs?)?|Fri)\b\.?")

_PLAIN: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\b(?:half an hour|half-hour|half hour)\b", re.IGNORECASE), "30 minutes"),
    (re.compile(r"\b(?:an hour and a half|1 and a half hours)\b", re.IGNORECASE), "90 minutes"),
    (re.compile(r"\b(?:a quarter of an hour|quarter of an hour)\b", re.IGNORECASE), "15 minutes"),
    (re.compile(r"\b(?:a fortnight|fortnight)\b", re.IGNORECASE), "2 weeks"),
    (re.compile(r"\b(?:a|one) dozen\b", re.IGNORECASE), "12"),
    (re.compile(r"\bhalf a million\b", re.IGNORECASE), "500000"),
    (re.compile(r"\ba (hundred|thousand|million|billion)\b", re.IGNORECASE), r"one \1"),
    (re.compile(r"\ban? (?=(?:single|pair)\b)", re.IGNORECASE), ""),
    (re.compile(r"\bpair of\b", re.IGNORECASE), "two"),
)
_AFTER_NUMBERS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"(?<=\d)\s*(?:percent|per cent)\b", re.IGNORECASE), "%"),
    (re.compile(r"(?<=\d)\s+%"), "%"),
    (re.compile(r"\b(?:minus|negative)\s+(?=\d)", re.IGNORECASE), "-"),
    (re.compile(r"(?<=\d)\s*(?:degrees?\s+(?:celsius|centigrade|c)\b|°\s*c\b|degs?\s*c\b)", re.IGNORECASE), " °C"),
    (re.compile(r"(?<=\d)\s*(?:degrees?\s+fahrenheit\b|°\s*f\b|degs?\s*f\b)", re.IGNORECASE), " °F"),
    (re.compile(r"(?<![\w$.])(\d+(?:\.\d+)?)\s+dollars?\b", re.IGNORECASE), r"$\1"),
    (re.compile(r"(?<![\w€.])(\d+(?:\.\d+)?)\s+euros?\b", re.IGNORECASE), r"€\1"),
    (re.compile(r"\b(?:at |by )?(?:noon|midday)\b(?! shift)", re.IGNORECASE), "12:00"),
    (re.compile(r"\bmidnight\b", re.IGNORECASE), "00:00"),
)


BASES: Final = {name: (family, float(factor)) for family, rows in _UNIT_TABLE.items() for name, factor, _ in rows}
"""Unit as a normal form writes it -> (what it measures, factor to the family's base)."""


def normal_form(text: str) -> str:
    """``text`` with numbers, clock times, quantities and dates in their one spelling; the rest untouched."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = _SPOKEN_CLOCK.sub(_spoken_clock, text)
    text = _OCLOCK.sub(_oclock, text)
    text = _NUMBER_WORDS.sub(_number_words, text)
    text = _CLOCK.sub(_clock, text)
    text = _CLOCK_24.sub(r"0\g<hour>:\g<minute>", text)
    text = _THOUSANDS.sub(lambda found: found[1] + found[2].replace(",", ""), text)
    text = _SCALED.sub(lambda found: _plain(Decimal(found[1]) * _SCALE_OF[found[2].lower()]), text)
    for pattern, plain in _AFTER_NUMBERS:
        text = pattern.sub(plain, text)
    text = _QUANTITY.sub(_quantity, text)
    text = _ISO_DATE.sub(lambda found: f"{int(found[3])} {_MONTHS[int(found[2]) - 1]} {found[1]}", text)
    text = _MONTH_DAY.sub(lambda found: _date(found[2], found[1]), text)
    text = _DAY_MONTH.sub(lambda found: _date(found[1], found[2]), text)
    return _WEEKDAY.sub(lambda found: _WEEKDAYS[found[1].lower()], text)


def _number_words(found: re.Match[str]) -> str:
    words = [word for word in re.split(r"[\s-]+", found[0].lower()) if word != "and"]
    if words == ["one"] and _PRONOUN_BEFORE.search(found.string, 0, found.start()):
        return found[0]
    total = current = 0
    previous = 0
    for word in words:
        if word in _SCALES:
            scale = _SCALES[word]
            if scale == 100:
                current = max(current, 1) * 100
            else:
                total, current = total + max(current, 1) * scale, 0
            previous = scale
            continue
        value = _TENS.get(word, _ONES.get(word, 0))
        if 0 < previous < 20 or (20 <= previous < 100 and value >= 10):
            return found[0]  # "two three", "twenty thirty": a list or a range, not one number
        current += value
        previous = max(value, 1)
    return str(total + current)


def _hour(text: str) -> int:
    return _ONES[text.lower()] if text.lower() in _ONES else int(text)


def _spoken_clock(found: re.Match[str]) -> str:
    if found["side"].lower() == "to" and not found["lead"]:
        return found[0]  # "ten to six people"
    minutes = _MINUTES[found["minutes"].lower()]
    hour = _hour(found["hour"]) % 12
    if found["side"].lower() == "to":
        hour, minutes = (hour - 1) % 12, 60 - minutes
    told = _time(_half_day(hour, found), minutes)
    return f"{found['lead'] or ''}{found['gap']}{told}"


def _oclock(found: re.Match[str]) -> str:
    return _time(_half_day(_hour(found["hour"]) % 12, found), 0)


def _half_day(hour: int, found: re.Match[str]) -> int:
    """``hour`` (0-11) on the 24-hour clock as far as the words after it tell; 0 is told as 12."""
    part = (found["part"] or "").lower()
    if part in ("afternoon", "evening") or found["night"]:
        return hour + 12
    return hour if part or hour else 12


def _clock(found: re.Match[str]) -> str:
    hour = int(found["hour"])
    if hour > 12:
        return _time(hour, int(found["minute"] or 0))
    return _time(hour % 12 + (12 if found["half"][0].lower() == "p" else 0), int(found["minute"] or 0))


def _time(hour: int, minute: int) -> str:
    return f"{hour % 24:02d}:{minute:02d}"


def _quantity(found: re.Match[str]) -> str:
    spelling = found["unit"]
    for family, own, factor, pattern in _UNITS:
        if pattern.match(spelling) is None:
            continue
        base = Decimal(found["value"]) * factor
        for name, other, _ in _UNIT_TABLE[family]:
            value = base / Decimal(other)
            if value >= 1 and value * 1_000 % 1 == 0:
                return f"{_plain(value)} {name}"
        return f"{_plain(Decimal(found['value']))} {own}"
    return found[0]


def _date(day: str, month: str) -> str:
    index = next(i for i, name in enumerate(_MONTHS) if name.startswith(month.lower()[:3]))
    return f"{int(day)} {_MONTHS[index]}"


def _plain(value: Decimal) -> str:
    text = f"{value.normalize():f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
