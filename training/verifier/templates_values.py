"""Templates about values: counts, quantities, dates, quantifiers; each contradiction with matched statements that are none."""

import random

from training.verifier import vocabulary as v
from training.verifier.examples import CONTRADICTION as C
from training.verifier.examples import ENTAILMENT as E
from training.verifier.examples import NEUTRAL as N
from training.verifier.examples import Split
from training.verifier.frames import Draft, draft, read_frames

COUNT = read_frames("""
A anchor:
    {x} {verb} {told} {what}
    ~ by the last tally {x} {verb} {told} {what}
C number:
    {x} {verb} {m} {what}
    ~ I counted them, {x} {verb} {m} {what}
C number:
    {x} {verb} only {m_spelled} {what}
    {x} {verb} just {m_spelled} {what}
    {x} {verb} exactly {m_spelled} {what}
    ~ {x} {verb} {m_spelled} {what}, not one more or less
C quantifier:
    {x} {verb} more than {high} {what}
    {x} {verb} over {high} {what}
    {x} {verb} at least {high} {what}
    ~ {x} {verb} {high} {what} or more
C quantifier:
    {x} {verb} fewer than {low} {what}
    {x} {verb} under {low} {what}
    {x} {verb} no more than {low} {what}
    ~ {x} {verb} {low} {what} or fewer
C negation:
    {x} {verb} no {what} at all
    ~ {x} {verb} not a single one of the {what} people speak of
E quantifier:
    {x} {verb} more than {low} {what}
    {x} {verb} over {low} {what}
    {x} {verb} at least {low} {what}
    {x} {verb} upwards of {low} {what}
    ~ {x} {verb} {low} {what} or more
E quantifier:
    {x} {verb} fewer than {high} {what}
    {x} {verb} at most {high} {what}
    {x} {verb} no more than {high} {what}
    {x} {verb} under {high} {what}
    ~ {x} {verb} {high} {what} or fewer
E number-words:
    {x} {verb} {twin} {what}
    ~ in the books it says that {x} {verb} {twin} {what}
E general:
    {x} {verb} several {what}
    {x} {verb} some {what}
    {x} {verb} a number of {what}
    ~ {x} {verb} {what}, and more than one
N entity:
    {y} {verb_y} {m} {what_y}
    {y} {verb_y} no {what_y} at all
    {y} {verb_y} exactly {m_spelled} {what_y}
    ~ then there is {y}: it {verb_y} {m} {what_y}
N time:
    last year {x} {past} {m} {what}
    in 2011 {x} {past} {m} {what}
    a decade ago {x} {past} {m} {what}
    ~ when the century began {x} {past} {m} {what}
N partial:
    {x} {verb} {m} of the {what} that were promised, and more are on the way
    ~ of the {what} asked for, {x} {verb} {m} so far, the rest from elsewhere
N partial:
    {fewer} of the {what} in question are new
    ~ {fewer} among the {what} were singled out
N plan:
    the plan is for {x} to have {m} {what} one day
    ~ they would like {x} to get {m} {what} eventually
""")


def count(rng: random.Random, split: Split) -> Draft:
    """Counts: another number, bounds that agree and bounds that do not, rounding, another thing's number."""
    (x, verb, what), (y, verb_y, what_y) = rng.sample(v.part(v.COUNTED, split), 2)
    n = rng.choice([rng.randint(3, 20), rng.randint(21, 99), rng.randint(100, 600)])
    off = rng.choice([-1, 1]) * max(1, int(n * rng.choice([0.1, 0.25, 0.5])))
    m, step = n + off, max(1, n // 5)
    told, twin = rng.choice([(str(n), spell(n)), (spell(n), spell(n)), (spell(n), str(n))])
    slots = {
        "x": x,
        "verb": verb,
        "what": what,
        "y": y,
        "verb_y": verb_y,
        "what_y": what_y,
        "past": _past(verb),
        "m": m,
        "m_spelled": spell(m),
        "high": n + step,
        "low": max(1, n - step),
        "told": told,
        "twin": twin,
        "fewer": rng.randint(2, max(2, n - 1)),
    }
    return draft(rng, split, COUNT, slots, most={C: 3, E: 3, N: 3})


def _past(verb: str) -> str:
    return {
        "has": "had",
        "contains": "contained",
        "holds": "held",
        "owns": "owned",
        "lists": "listed",
        "offers": "offered",
        "consists of": "consisted of",
        "numbers": "numbered",
        "records": "recorded",
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


AMOUNTS = {  # of each family the last is kept for measuring
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
        (["3.5 litres", "3,500 ml", "three and a half litres"], ["35 litres", "2.5 litres", "530 ml"]),
        (["0.75 litres", "750 ml", "three quarters of a litre"], ["75 ml", "1.75 litres", "500 ml"]),
    ],
    "data": [
        (["2 TB", "2,000 GB", "two terabytes"], ["20 TB", "200 GB", "1 TB"]),
        (["64 GB", "64,000 MB", "64 gigabytes"], ["46 GB", "640 GB", "6.4 GB"]),
        (["512 MB", "0.512 GB", "512 megabytes"], ["256 MB", "512 GB", "5 GB"]),
    ],
}


QUANTITY = read_frames("""
A anchor:
    {x} {verb} {one} {tail}
    ~ to be precise, {x} {verb} {one} {tail}
C unit:
    {x} {verb} {wrong} {tail}
    ~ on second thoughts, {x} {verb} {wrong} {tail}
C number:
    it is {wrong2} that {x} {verb} {tail}
    {x} {verb} {wrong2}, not {twin}
    {x} doesn't {bare} {twin} {tail}
    ~ {twin} is a mistake, {x} {verb} {wrong2}
    ~ you'd be wrong to think that {x} {verb} {twin} {tail}
E unit:
    {x} {verb} {twin} {tail}
    ~ all told {x} {verb} {twin} {tail}
E unit:
    {x} {verb} {twin}, in other words {one}
    {x} {verb} exactly {twin} {tail}
    {x} {verb} {twin}, not {wrong2}
    {x} doesn't {bare} {wrong} {tail}
    according to the notes, {x} {verb} {twin}
    ~ {twin}, that is what {x} {verb} {tail}
    ~ I measured it and {x} {verb} {twin}
N entity:
    {y} {verb_y} {wrong_y} {tail_y}
    {y} doesn't {bare_y} {wrong_y} {tail_y}
    ~ something else: {y} {verb_y} {wrong_y} {tail_y}
N time:
    before the change {x} {verb} {wrong2}, people say
    in the old version it was {wrong} for {x}
    does {x} really {bare} {wrong}?
    one day {x} may {bare} {wrong2}
    ~ with the first model it had been {wrong} for {x}
    ~ could {x} {bare} {wrong} in the future?
""")


def quantity(rng: random.Random, split: Split) -> Draft:
    """Durations and measures: the same in another unit, another one, another thing's, a bound."""
    wrong_y = ""
    if rng.random() < 0.6:
        (x, verb, tail), (y, verb_y, tail_y) = rng.sample(v.part(v.TIMED, split), 2)
        same, different = rng.choice(v.part(DURATIONS, split))
    else:
        (x, verb, family), (y, verb_y, family_y) = rng.sample(v.part(v.MEASURED, split), 2)
        tail = tail_y = rng.choice(["", "when full", "according to the label"])
        if family_y != family:  # nothing weighs five litres
            wrong_y = rng.choice(rng.choice(v.part(AMOUNTS[family_y], split))[1])
        same, different = rng.choice(v.part(AMOUNTS[family], split))
    one, twin = rng.sample(same, 2)
    wrong, wrong2 = rng.sample(different, 2)
    slots = {
        "x": x,
        "verb": verb,
        "tail": tail,
        "wrong_y": wrong_y or wrong,
        "y": y,
        "verb_y": verb_y,
        "tail_y": tail_y,
        "bare": _bare(verb),
        "bare_y": _bare(verb_y),
        "one": one,
        "twin": twin,
        "wrong": wrong,
        "wrong2": wrong2,
    }
    return draft(rng, split, QUANTITY, slots)


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


DATE = read_frames("""
A anchor:
    {x} {begins} {first}
    ~ the diary says: {x} {begins} {first}
C date:
    {x} {begins} {wrong}
    ~ the poster says that {x} {begins} {wrong}
C date:
    {x} is {wrong2}
    {x} has been moved and now is {wrong2}
    {x} is not {same}, it is {wrong2}
    ~ the new slot for {x} is {wrong2}
    ~ they shifted {x}, so it is {wrong2}
C negation:
    {x} does not take place {same}
    {x} has been called off
    there will be no {bare} {same}
    ~ nothing will come of {x}, it was dropped
    ~ whoever expects {x} {same} waits in vain
E paraphrase:
    {x} is {same}
    mark your calendars: {x} takes place {same}
    {x} has not been called off, it is {same}
    {x} has been moved and now is {same}
    {when} is when {x} starts
    ~ be there {same} for {x}
    ~ the doors for {x} open {same}, when it begins
N entity:
    {y} is {wrong}
    {y} has been moved and now is {wrong}
    {y} has been called off
    {y} does not take place {same}
    there will be no {bare_y} {same}
    ~ separately, {y} is {wrong}
N time:
    two years ago {x} was {wrong}
    the previous edition of {x} was {wrong}
    originally the idea was to hold {x} {wrong}
    ~ the time before, {x} was {wrong}
    ~ at first they had wanted {x} {wrong}
N additive:
    registration for {x} closes {wrong}
    the rehearsal for {x} is {wrong}
    is {x} {wrong}?
    the report on {x} is due {wrong2}
    ~ the briefing ahead of {x} is {wrong}
    ~ somebody will tidy up after {x} {wrong2}
""")


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
    slots = {
        "x": x,
        "y": y,
        "bare": x.removeprefix("the "),
        "bare_y": y.removeprefix("the "),
        "begins": rng.choice(["takes place", "is", "is set to start", "begins"]),
        "first": first,
        "same": same,
        "when": same.removeprefix("on "),
        "wrong": wrong,
        "wrong2": wrong2,
    }
    return draft(rng, split, DATE, slots)


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 11 <= n % 100 <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


QUANTIFIED = read_frames("""
N every:
    all {who} {does}
    every single one of {who} {does_one}
    {who}, without exception, {does}
    ~ {who}, each and every one, {does}
    ~ there is not one among {who} of whom it is false that they {does}
C none:
    none of {who} {does}
    no {noun} {does}
    not a single one of {who} {does_one}
    ~ not any of {who} {does}
    ~ {who} {does}? not one
E some:
    some of {who} {does}
    a few of {who} {does}
    at least one of {who} {does_one}
    ~ certain of {who} {does}
    ~ there are those among {who} that {does}
N most:
    most of {who} {does}
    the majority of {who} {does}
    ~ the greater part of {who} {does}
N not all:
    not all {who} {does}
    not every one of {who} {does_one}
    ~ by no means all of {who} {does}
    ~ only a part of {who} {does}
N few:
    hardly any of {who} {does}
    very few of {who} {does}
    ~ scarcely any of {who} {does}
N entity:
    all {others} {does}
    none of {others} {does}
    few of {others} {does}
    not all {others} {does}
    ~ a different matter: all {others} {does}
    ~ a different matter: none of {others} {does}
""")
"""Here the labels depend on what the anchor says (``EXCLUDE``, ``FOLLOW``), so those of the groups are not used."""
EXCLUDE = {
    "every": ("none", "not all", "few"),
    "none": ("every", "some", "most"),
    "some": ("none",),
    "most": ("none", "few"),
    "not all": ("every",),
    "few": ("every", "most"),
}
FOLLOW = {
    "every": ("some", "most"),
    "none": ("not all",),
    "some": (),
    "most": ("some",),
    "not all": (),
    "few": ("not all",),
}
BESIDE = {
    "every": (),
    "none": (),
    "some": ("every", "not all", "most"),
    "most": ("not all",),
    "not all": ("some", "most", "few"),
    "few": ("some",),
}


def quantified(rng: random.Random, split: Split) -> Draft:
    """All, none, some, most: which of them exclude each other and which do not."""
    (who, does), (others, _) = rng.sample(v.part(v.QUANTIFIED, split), 2)
    slots = {
        "who": who,
        "others": others,
        "does": does,
        "does_one": does.replace("have", "has", 1).replace("are ", "is ", 1),
        "noun": who.removeprefix("the "),
    }
    groups = {group.kind: group for group in QUANTIFIED}
    told = rng.choice(list(EXCLUDE))
    items = [
        (groups[kind].say(rng, split, slots), label, "quantifier")
        for label, kinds in ((C, EXCLUDE[told]), (E, FOLLOW[told]), (N, BESIDE[told]))
        for kind in kinds
    ]
    anchor, twin = (groups[told].say(rng, split, slots) for _ in range(2))
    if twin != anchor:
        items.append((twin, E, "paraphrase"))
    return anchor, [*items, (groups["entity"].say(rng, split, slots), N, "entity")]


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
