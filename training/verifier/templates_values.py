"""Templates about values: counts, quantities, dates, quantifiers; each contradiction with matched statements that are none."""

import random

from training.verifier import vocabulary as v
from training.verifier.examples import CONTRADICTION as C
from training.verifier.examples import ENTAILMENT as E
from training.verifier.examples import NEUTRAL as N
from training.verifier.examples import Split

Draft = tuple[str, list[tuple[str, int, str]]]
"""An anchor, and (text, label, kind) of its items."""


def count(rng: random.Random, split: Split) -> Draft:
    """Counts: another number, bounds that agree and bounds that do not, rounding, another thing's number."""
    options = v.COUNTED[:12] if split == "train" else v.COUNTED[12:]
    (x, verb, what), (y, verb_y, what_y) = rng.sample(options, 2)
    n = rng.choice([rng.randint(3, 20), rng.randint(21, 99), rng.randint(100, 600)])
    off = rng.choice([-1, 1]) * max(1, int(n * rng.choice([0.1, 0.25, 0.5])))
    m, step = n + off, max(1, n // 5)
    spelled = spell(n)
    items = [
        (f"{x} {verb} {m} {what}", C, "number"),
        (f"{x} {verb} {rng.choice(['only', 'just', 'exactly'])} {spell(m)} {what}", C, "number"),
        (f"{x} {verb} {rng.choice(['more than', 'over', 'at least'])} {n + step} {what}", C, "quantifier"),
        (
            f"{x} {verb} {rng.choice(['fewer than', 'under', 'no more than'])} {max(1, n - step)} {what}",
            C,
            "quantifier",
        ),
        (f"{x} {verb} no {what} at all", C, "negation"),
        (
            f"{x} {verb} {rng.choice(['more than', 'over', 'at least', 'upwards of'])} {max(1, n - step)} {what}",
            E,
            "quantifier",
        ),
        (
            f"{x} {verb} {rng.choice(['fewer than', 'at most', 'no more than', 'under'])} {n + step} {what}",
            E,
            "quantifier",
        ),
        (f"{x} {verb} {spelled} {what}", E, "number-words"),
        (f"{x} {verb} {rng.choice(['several', 'some', 'a number of'])} {what}", E, "general"),
        (f"{y} {verb_y} {m} {what_y}", N, "entity"),
        (f"{rng.choice(['last year', 'in 2011', 'a decade ago'])} {x} {_past(verb)} {m} {what}", N, "time"),
        (f"{x} {verb} {m} of the {what} that were promised, and more are on the way", N, "partial"),
        (f"{rng.randint(2, max(2, n - 1))} of the {what} in question are new", N, "partial"),
        (f"the plan is for {x} to have {m} {what} one day", N, "plan"),
    ]
    told = rng.choice([str(n), spelled])
    anchor = f"{x} {verb} {told} {what}"
    return anchor, rng.sample(items[:5], 3) + rng.sample(items[5:9], 3) + rng.sample(items[9:], 3)


def _past(verb: str) -> str:
    return {
        "has": "had",
        "contains": "contained",
        "holds": "held",
        "owns": "owned",
        "lists": "listed",
        "offers": "offered",
    }.get(verb, verb)


DURATIONS = [
    (["2 hours", "120 minutes", "two hours", "2 h"], ["3 hours", "90 minutes", "200 minutes", "twelve hours"]),
    (
        ["90 minutes", "an hour and a half", "1.5 hours", "90 min"],
        ["half an hour", "2 hours", "19 minutes", "three hours"],
    ),
    (
        ["30 minutes", "half an hour", "thirty minutes", "0.5 hours"],
        ["45 minutes", "an hour and a half", "3 minutes", "1 hour"],
    ),
    (["24 hours", "one day", "1 day", "1,440 minutes"], ["48 hours", "12 hours", "4 days", "ten hours"]),
    (["2 weeks", "14 days", "a fortnight", "fourteen days"], ["10 days", "one week", "four weeks", "40 days"]),
    (["18 months", "a year and a half", "1.5 years"], ["12 months", "two years", "8 months", "eight months"]),
    (["3 years", "36 months", "three years"], ["2 years", "30 months", "five years", "thirteen months"]),
    (
        ["45 seconds", "45 s", "three quarters of a minute", "0.75 minutes"],
        ["54 seconds", "4 minutes", "15 seconds", "two minutes"],
    ),
    (["72 hours", "three days", "3 days"], ["two days", "27 hours", "a week", "36 hours"]),
    (
        ["5 minutes", "300 seconds", "five minutes", "300 s"],
        ["15 minutes", "500 seconds", "three minutes", "30 seconds"],
    ),
]


AMOUNTS = {
    "mass": [
        (["2.5 kg", "2,500 grams", "2500 g", "two and a half kilos"], ["25 kg", "1.5 kg", "2 kg", "250 grams"]),
        (["800 grams", "0.8 kg", "800 g"], ["80 grams", "8 kg", "900 g"]),
        (["1.2 tonnes", "1,200 kilograms", "1200 kg"], ["2.1 tonnes", "120 kilos", "1,500 kg"]),
    ],
    "length": [
        (["1.5 km", "1,500 metres", "1500 m"], ["15 km", "500 metres", "1.8 km"]),
        (["2 metres", "200 cm", "two metres", "2 m"], ["12 metres", "20 cm", "3 m"]),
        (["40 centimetres", "400 mm", "0.4 m"], ["4 metres", "40 mm", "45 cm"]),
    ],
    "volume": [
        (["50 litres", "50 l", "fifty litres", "50,000 ml"], ["15 litres", "5 l", "60 litres"]),
        (["0.75 litres", "750 ml", "three quarters of a litre"], ["75 ml", "1.75 litres", "500 ml"]),
    ],
    "data": [
        (["2 TB", "2,000 GB", "two terabytes"], ["20 TB", "200 GB", "1 TB"]),
        (["512 MB", "0.512 GB", "512 megabytes"], ["256 MB", "512 GB", "5 GB"]),
    ],
}


def quantity(rng: random.Random, split: Split) -> Draft:
    """Durations and measures: the same in another unit, another one, another thing's, a bound."""
    if rng.random() < 0.6:
        (x, verb, tail), (y, verb_y, tail_y) = rng.sample(v.TIMED[:8] if split == "train" else v.TIMED[8:], 2)
        same, different = rng.choice(DURATIONS[:7] if split == "train" else DURATIONS[7:])
    else:
        x, verb, family = rng.choice(v.MEASURED[:8] if split == "train" else v.MEASURED[8:])
        y, verb_y, _ = rng.choice([m for m in (v.MEASURED[:8] if split == "train" else v.MEASURED[8:]) if m[0] != x])
        tail = tail_y = rng.choice(["", "when full", "according to the label"])
        same, different = rng.choice(AMOUNTS[family])
    one, twin = rng.sample(same, 2)
    wrong, wrong2 = rng.sample(different, 2)
    anchor = f"{x} {verb} {one} {tail}".strip()
    return anchor, [
        (f"{x} {verb} {wrong} {tail}".strip(), C, "unit"),
        (
            rng.choice(
                [
                    f"it is {wrong2} that {x} {verb} {tail}",
                    f"{x} {verb} {wrong2}, not {twin}",
                    f"{x} doesn't {_bare(verb)} {twin} {tail}",
                ]
            ).strip(),
            C,
            "number",
        ),
        (f"{x} {verb} {twin} {tail}".strip(), E, "unit"),
        (
            rng.choice(
                [
                    f"{x} {verb} {twin}, in other words {one}",
                    f"{x} {verb} exactly {twin} {tail}",
                    f"according to the notes, {x} {verb} {twin}",
                ]
            ).strip(),
            E,
            "unit",
        ),
        (f"{y} {verb_y} {wrong} {tail_y}".strip(), N, "entity"),
        (
            rng.choice(
                [
                    f"before the change {x} {verb} {wrong2}, people say",
                    f"in the old version it was {wrong} for {x}",
                    f"does {x} really {_bare(verb)} {wrong}?",
                    f"one day {x} may {_bare(verb)} {wrong2}",
                ]
            ),
            N,
            "time",
        ),
    ]


def _bare(verb: str) -> str:
    return {
        "takes": "take",
        "lasts": "last",
        "rests": "rest",
        "is": "have",
        "runs": "run",
        "runs for": "run for",
        "weighs": "weigh",
        "measures": "measure",
        "holds": "hold",
        "stores": "store",
        "comes with": "come with",
        "takes up": "take up",
    }.get(verb, verb)


WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def date(rng: random.Random, split: Split) -> Draft:
    """Dates, weekdays and clock times of events; the same told otherwise, other events and other years."""
    x, y = rng.sample(v.part(v.EVENTS, split), 2)
    if rng.random() < 0.4:
        a, b = rng.sample(WEEKDAYS, 2)
        first, same, wrong = f"on {a}", f"this {a}", f"on {b}"
        wrong2 = f"on {rng.choice([d for d in WEEKDAYS if d != a])}"
    elif rng.random() < 0.5:
        day, month = rng.randint(1, 28), rng.choice(MONTHS)
        other_day = rng.choice([d for d in range(1, 29) if d != day])
        other_month = rng.choice([m for m in MONTHS if m != month])
        first, same = f"on {day} {month}", f"on {month} {_ordinal(day)}"
        wrong, wrong2 = f"on {other_day} {month}", f"on the {_ordinal(day)} of {other_month}"
    else:
        hour, minute = rng.randint(1, 11), rng.choice([0, 15, 30, 45])
        later = rng.choice([h for h in range(1, 12) if h != hour])
        first, same = f"at {hour}:{minute:02d} pm", f"at {hour + 12}:{minute:02d}"
        wrong, wrong2 = f"at {later}:{minute:02d} pm", f"at {hour + 12}:{(minute + 20) % 60:02d}"
    start = rng.choice(["takes place", "is", "is scheduled for", "begins"])
    begins = "is set to start" if start == "is scheduled for" else start
    return f"{x} {begins} {first}", [
        (f"{x} {begins} {wrong}", C, "date"),
        (
            rng.choice(
                [f"{x} is {wrong2}", f"{x} has been moved and now is {wrong2}", f"{x} is not {same}, it is {wrong2}"]
            ),
            C,
            "date",
        ),
        (
            rng.choice(
                [
                    f"{x} does not take place {same}",
                    f"{x} has been called off",
                    f"there will be no {x.removeprefix('the ')} {same}",
                ]
            ),
            C,
            "negation",
        ),
        (
            rng.choice(
                [
                    f"{x} is {same}",
                    f"mark your calendars: {x} takes place {same}",
                    f"{same} is when {x} starts".replace("on ", "", 1),
                ]
            ),
            E,
            "paraphrase",
        ),
        (f"{y} is {wrong}", N, "entity"),
        (
            rng.choice(
                [
                    f"two years ago {x} was {wrong}",
                    f"the previous edition of {x} was {wrong}",
                    f"originally the idea was to hold {x} {wrong}",
                ]
            ),
            N,
            "time",
        ),
        (
            rng.choice(
                [
                    f"registration for {x} closes {wrong}",
                    f"the rehearsal for {x} is {wrong}",
                    f"is {x} {wrong}?",
                    f"the report on {x} is due {wrong2}",
                ]
            ),
            N,
            "additive",
        ),
    ]


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 11 <= n % 100 <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


QUANTIFIED = [
    ("the invoices", "have been paid"),
    ("the nurses on ward 5", "are vaccinated"),
    ("the lifts", "are working"),
    ("the delegates", "voted for the motion"),
    ("the rooms on the second floor", "have a balcony"),
    ("the samples", "tested positive"),
    ("the pods", "restarted overnight"),
    ("the trainees", "passed the exam"),
    ("the windows", "were left open"),
    ("the players", "speak Spanish"),
    ("the tickets", "are refundable"),
    ("the buses", "run on Sundays"),
]


def quantified(rng: random.Random, split: Split) -> Draft:
    """All, none, some, most: which of them exclude each other and which do not."""
    (who, does), (others, _) = rng.sample(QUANTIFIED[:8] if split == "train" else QUANTIFIED[8:], 2)
    noun = who.removeprefix("the ")
    every = [
        f"all {who} {does}",
        f"every single one of {who} {does.replace('have', 'has', 1).replace('are ', 'is ', 1)}",
        f"{who}, without exception, {does}",
    ]
    none = [
        f"none of {who} {does}",
        f"no {noun} {does}",
        f"not a single one of {who} {does.replace('have', 'has', 1).replace('are ', 'is ', 1)}",
    ]
    some = [
        f"some of {who} {does}",
        f"a few of {who} {does}",
        f"at least one of {who} {does.replace('have', 'has', 1).replace('are ', 'is ', 1)}",
    ]
    most = [f"most of {who} {does}", f"the majority of {who} {does}"]
    not_all = [
        f"not all {who} {does}",
        f"not every one of {who} {does.replace('have', 'has', 1).replace('are ', 'is ', 1)}",
    ]
    few = [f"hardly any of {who} {does}", f"very few of {who} {does}"]
    stranger = (f"{rng.choice(['all', 'none of', 'few of', 'not all'])} {others} {does}", N, "entity")
    forms = {
        "every": (every, [(none, C), (not_all, C), (few, C), (some, E), (most, E)]),
        "none": (none, [(every, C), (some, C), (most, C), (not_all, E)]),
        "some": (some, [(none, C), (every, N), (not_all, N), (most, N)]),
        "most": (most, [(none, C), (few, C), (some, E), (not_all, N)]),
        "not all": (not_all, [(every, C), (some, N), (most, N), (few, N)]),
        "few": (few, [(every, C), (most, C), (not_all, E), (some, N)]),
    }
    told, rest = forms[rng.choice(list(forms))]
    items = [(rng.choice(said), label, "quantifier") for said, label in rest]
    twin = rng.choice(told)
    anchor = rng.choice(told)
    if twin != anchor:
        items.append((twin, E, "paraphrase"))
    return anchor, [*items, stranger]


_UNITS = [
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


_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(n: int) -> str:
    """``n`` (0 to 999) in English words.

    Raises:
        ValueError: ``n`` is outside that range.
    """
    if not 0 <= n < 1_000:
        raise ValueError(f"n: expected 0 to 999, got {n}")
    if n < 20:
        return _UNITS[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_UNITS[n % 10]}" if n % 10 else "")
    rest = f" and {spell(n % 100)}" if n % 100 else ""
    return f"{_UNITS[n // 100]} hundred{rest}"
