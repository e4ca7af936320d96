"""The word lists behind textual evidence, loaded once from ``data/``, and the stemmer that both sides go through."""

from functools import lru_cache
from importlib import resources
from typing import Final

from kimera_stream.infrastructure.caching import KeptResults

_KEPT_CHARS = 32
"""Length of a word whose stem is remembered: with longer ones (runs of letters, not words) the memory would have no bound."""

IRREGULAR = {
    "was": "be", "were": "be", "is": "be", "are": "be", "am": "be", "been": "be", "being": "be",
    "has": "have", "had": "have", "having": "have", "does": "do", "did": "do", "done": "do",
    "went": "go", "gone": "go", "goes": "go", "came": "come", "ran": "run", "won": "win", "lost": "lose",
    "left": "leave", "bought": "buy", "brought": "bring", "thought": "think", "caught": "catch", "taught": "teach",
    "sold": "sell", "told": "tell", "held": "hold", "kept": "keep", "slept": "sleep", "met": "meet", "paid": "pay",
    "said": "say", "made": "make", "sent": "send", "spent": "spend", "built": "build", "lent": "lend", "felt": "feel",
    "found": "find", "stood": "stand", "understood": "understand", "took": "take", "taken": "take", "gave": "give",
    "given": "give", "got": "get", "gotten": "get", "knew": "know", "known": "know", "grew": "grow", "grown": "grow",
    "flew": "fly", "flown": "fly", "drew": "draw", "drawn": "draw", "wrote": "write", "written": "write",
    "rose": "rise", "risen": "rise", "drove": "drive", "driven": "drive", "spoke": "speak", "spoken": "speak",
    "broke": "break", "broken": "break", "chose": "choose", "chosen": "choose", "froze": "freeze", "frozen": "freeze",
    "began": "begin", "begun": "begin", "sang": "sing", "sung": "sing", "drank": "drink", "drunk": "drink",
    "swam": "swim", "swum": "swim", "ate": "eat", "eaten": "eat", "fell": "fall", "fallen": "fall", "saw": "see",
    "seen": "see", "wore": "wear", "worn": "wear", "tore": "tear", "torn": "tear", "led": "lead", "read": "read",
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "lives": "life", "wives": "wife", "knives": "knife", "leaves": "leave",
    "better": "better", "best": "best", "this": "this", "news": "news", "series": "series", "species": "species",
}  # fmt: skip

FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "from",
        "as",
        "into",
        "onto",
        "upon",
        "about",
        "against",
        "between",
        "through",
        "during",
        "be",
        "have",
        "do",
        "will",
        "would",
        "can",
        "could",
        "shall",
        "should",
        "may",
        "might",
        "must",
        "it",
        "its",
        "this",
        "that",
        "these",
        "those",
        "there",
        "here",
        "and",
        "or",
        "but",
        "so",
        "than",
        "then",
        "if",
        "while",
        "when",
        "where",
        "who",
        "whom",
        "whose",
        "which",
        "what",
        "how",
        "i",
        "you",
        "he",
        "she",
        "we",
        "they",
        "them",
        "him",
        "her",
        "his",
        "their",
        "our",
        "my",
        "your",
        "me",
        "us",
        "mine",
        "yours",
        "hers",
        "theirs",
        "ours",
        "just",
        "also",
        "too",
        "very",
        "really",
        "quite",
        "still",
        "already",
        "yet",
        "again",
        "now",
        "only",
        "even",
        "some",
        "any",
        "such",
        "own",
        "same",
        "other",
        "another",
        "each",
        "per",
        "via",
        "'ll",
        "'ve",
        "'re",
        "'d",
        "'s",
        "'m",
        "s",
        "t",
        "ll",
        "ve",
        "re",
        "d",
        "m",
        "not",
        "no",
        "n't",
        "never",
        "up",
        "out",
        "off",
        "over",
    ]
)

NEGATORS = frozenset(
    [
        "not",
        "no",
        "never",
        "none",
        "nobody",
        "nothing",
        "neither",
        "nor",
        "without",
        "cannot",
        "nowhere",
        "hardly",
        "barely",
        "scarcely",
        "n't",
        "zero",
    ]
)
NEGATING_VERBS = frozenset(["lack", "prevent", "avoid"])
"""Stems of verbs that negate what follows: "lacks a licence"."""
NEGATING_BEFORE_TO = frozenset(["fail", "refus", "forget", "neglect", "declin"])
"""Stems of verbs that negate what follows "to": "failed to start"; without it they are statements of their own."""
PREDICATE_PARTICLES = frozenset(["up", "off", "on", "out"])
"""Function words that are what is said when a form of "be" comes before them: "db-1 is up"."""

ALL = frozenset(
    [
        "all",
        "every",
        "each",
        "both",
        "always",
        "everyone",
        "everybody",
        "everything",
        "everywhere",
        "entire",
        "whole",
        "fully",
    ]
)
NONE = frozenset(["no", "none", "nobody", "nothing", "never", "neither", "nowhere", "zero"])
SOME = frozenset(
    [
        "some",
        "several",
        "few",
        "many",
        "most",
        "somebody",
        "someone",
        "something",
        "sometimes",
        "part",
        "partly",
        "half",
        "majority",
        "any",
    ]
)

NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60,
    "seventy": 70, "eighty": 80, "ninety": 90, "dozen": 12, "once": 1, "twice": 2, "thrice": 3, "couple": 2, "half": 0.5,
    "third": 3, "single": 1,
}  # fmt: skip
MULTIPLIERS = {"hundred": 100, "thousand": 1_000, "million": 1e6, "billion": 1e9, "trillion": 1e12, "k": 1e3, "m": 1e6}
ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13, "fourteenth": 14, "fifteenth": 15, "sixteenth": 16,
    "seventeenth": 17, "eighteenth": 18, "nineteenth": 19, "twentieth": 20, "thirtieth": 30,
}  # fmt: skip
MONTHS = {
    name: number
    for number, names in enumerate(
        ("january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
         "september sep sept", "october oct", "november nov", "december dec"), start=1)
    for name in names.split()
}  # fmt: skip
WEEKDAYS = {
    name: number
    for number, names in enumerate(
        ("monday mon mondays", "tuesday tue tues tuesdays", "wednesday wed wednesdays", "thursday thu thurs thursdays",
         "friday fri fridays", "saturday sat saturdays", "sunday sun sundays"), start=1)
    for name in names.split()
}  # fmt: skip

UNITS: dict[str, tuple[str, float]] = {}
"""Unit name -> (what it measures, factor to the base unit)."""
for _dimension, _table in {
    "time": "ms millisecond:0.001 s sec second:1 min minute:60 h hr hour:3600 day:86400 week wk:604800 fortnight:1209600",
    "months": "month:1 year yr:12 decade:120 century:1200",
    "data": "b byte:1 kb kilobyte:1e3 mb megabyte:1e6 gb gigabyte gig:1e9 tb terabyte:1e12 pb petabyte:1e15 "
    "kib:1024 mib:1048576 gib:1073741824 tib:1099511627776",
    "bits": "kbit kbps:1e3 mbit mbps:1e6 gbit gbps:1e9",
    "length": "mm millimetre millimeter:0.001 cm centimetre centimeter:0.01 m metre meter:1 km kilometre kilometer:1000 "
    "inch:0.0254 ft foot feet:0.3048 yard:0.9144 mile mi:1609.344",
    "mass": "mg milligram:1e-6 g gram gramme:0.001 kg kilo kilogram:1 tonne ton:1000 lb lbs pound:0.45359237 oz ounce:0.0283495",
    "volume": "ml millilitre milliliter:0.001 cl:0.01 l litre liter:1 gallon:3.785 pint:0.568",
    "area": "sqm:1 hectare ha:10000 acre:4046.86",
    "power": "mw_:0.001 w watt:1 kw kilowatt:1000 megawatt:1e6 gw gigawatt:1e9",
    "energy": "wh:1 kwh:1000 mwh:1e6 gwh:1e9 kcal:1.163",
    "speed": "kmh km/h kph:1 mph:1.609344 m/s:3.6 knot:1.852",
    "frequency": "hz hertz:1 khz:1e3 mhz:1e6 ghz:1e9",
    "percent": "% percent pct:1",
    "celsius": "°c °C celsius:1",
    "dollar": "$ dollar usd buck:1 cent:0.01",
    "euro": "€ euro eur:1",
    "sterling": "£ gbp quid:1",
    "yen": "¥ yen jpy:1",
    "volt": "v volt:1 kv:1000 mv:0.001",
    "ampere": "a_ amp ampere:1 ma:0.001",
    "mah": "mah:1 ah:1000",
}.items():  # fmt: skip
    _names: list[str] = []
    for _part in _table.split():
        _name, _, _factor = _part.partition(":")
        _names.append(_name)
        if _factor:
            for _each in _names:
                UNITS[_each] = (_dimension, float(_factor))
            _names = []


def stem(word: str) -> str:
    """A key that inflections of one word share ("stopped", "stopping", "stops"). Not a word of any language."""
    return _kept_stem(word) if len(word) <= _KEPT_CHARS else _stem(word)


@lru_cache(maxsize=65_536)
def _kept_stem(word: str) -> str:
    return _stem(word)


STEMS: Final = KeptResults(_kept_stem, each=270)
"""What is remembered of words."""


def _stem(word: str) -> str:
    word = word.lower()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    if len(word) <= 3:
        return word
    for suffix in ("'s", "’s", "s'"):
        word = word.removesuffix(suffix)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "i"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for suffix in ("ing", "ed"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and any(c in "aeiouy" for c in word[: -len(suffix)]):
            word = word[: -len(suffix)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    if word.endswith("ly") and len(word) > 5:
        word = word[:-2]
    if word.endswith("e") and len(word) > 3:
        word = word[:-1]
    if word.endswith("y") and len(word) > 3:
        word = word[:-1] + "i"
    return word


def _lines(name: str) -> list[str]:
    text = (resources.files(__package__) / "data" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def phrase_stem(phrase: str) -> str:
    """Stem of each part of ``turned_off``, joined again."""
    return "_".join(stem(part) for part in phrase.split("_"))


def _antonyms() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for line in _lines("antonyms.txt"):
        left, right = ([phrase_stem(word) for word in side.split()] for side in line.split("|"))
        for one in left:
            for other in right:
                if one != other:
                    table.setdefault(one, set()).add(other)
                    table.setdefault(other, set()).add(one)
    return {key: frozenset(values) for key, values in table.items()}


def _cohorts() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for line in _lines("cohorts.txt"):
        name, _, members = line.partition(":")
        for word in members.split():
            table.setdefault(stem(word), set()).add(name.strip())
    return {key: frozenset(values) for key, values in table.items()}


# Constants, read with the module: read at first use they would block the event loop.
ANTONYMS = _antonyms()
"""Stem -> stems of its opposites. Phrases of two words are joined by an underscore."""
COHORTS = _cohorts()
"""Stem -> names of the cohorts it belongs to: values of which a thing has one at a time."""
PHRASES = frozenset(key for key in ANTONYMS if "_" in key)
"""Two-word phrases of the antonym list, as joined stems."""
