"""Templates about states, roles, relations and events; each contradiction with matched statements that are none."""

import random

from training.verifier import vocabulary as v
from training.verifier.examples import CONTRADICTION as C
from training.verifier.examples import ENTAILMENT as E
from training.verifier.examples import NEUTRAL as N
from training.verifier.examples import Split

Draft = tuple[str, list[tuple[str, int, str]]]
"""An anchor, and (text, label, kind) of its items."""


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    one, other = rng.sample(words, 2)
    return one, other


def state(rng: random.Random, split: Split) -> Draft:
    """Opposite states: antonym, negation, double negation; other thing, other time, plan, question, doubt."""
    pair = rng.choice([o for o in v.OPPOSITES if o.split == split])
    one, other = (pair.one, pair.other) if rng.random() < 0.5 else (pair.other, pair.one)
    x, y = _two(rng, v.part(v.SUBJECTS[pair.on], split))
    is_, same, anti = rng.choice(one), rng.choice(one), rng.choice(other)
    items = [
        (f"{x} is {anti}", C, "antonym"),
        (f"{x} is not {same}", C, "negation"),
        (
            rng.choice(
                [f"it is not true that {x} is {is_}", f"{x} is anything but {same}", f"by no means is {x} {is_}"]
            ),
            C,
            "negation",
        ),
        (
            rng.choice(
                [f"{x} is no longer {is_}", f"update: {x} is now {anti}", f"correction: {x} is {anti}, not {is_}"]
            ),
            C,
            "correction",
        ),
        (
            rng.choice(
                [
                    f"{x} is not {anti}",
                    f"it is not the case that {x} is {anti}",
                    f"{x} is no longer {anti}",
                    f"{x} isn't {anti} any more",
                ]
            ),
            E,
            "double-negation",
        ),
        (
            rng.choice(
                [
                    f"it is false that {x} is not {is_}",
                    f"nobody denies that {x} is {is_}",
                    f"it isn't true that {x} isn't {same}",
                ]
            ),
            E,
            "double-negation",
        ),
        (
            rng.choice(
                [f"{x} is {same}", f"{x} is currently {same}", f"yes, {x} is {is_}", f"confirmed: {x} is {same}"]
            ),
            E,
            "paraphrase",
        ),
        (f"{y} is {anti}", N, "entity"),
        (f"{y} is not {is_}", N, "entity"),
        (
            rng.choice(
                [
                    f"last month {x} was {anti}",
                    f"{x} was {anti} back in 2019",
                    f"two years ago {x} was not {is_}",
                    f"until recently {x} was {anti}",
                ]
            ),
            N,
            "time",
        ),
        (
            rng.choice(
                [
                    f"{x} will be {anti} by next summer",
                    f"{x} might be {anti} next week",
                    f"from next year {x} will not be {is_}",
                ]
            ),
            N,
            "plan",
        ),
        (
            rng.choice(
                [
                    f"is {x} {anti}?",
                    f"does anyone know if {x} is {anti}?",
                    f"if {x} is {anti}, call me",
                    f"we were asked whether {x} is {anti}",
                ]
            ),
            N,
            "question",
        ),
        (
            rng.choice(
                [f"everyone asks about {x}", f"someone looked at {x} this morning", f"{y} and {x} are not the same"]
            ),
            N,
            "additive",
        ),
    ]
    return f"{x} is {is_}", rng.sample(items[:4], 2) + rng.sample(items[4:7], 2) + rng.sample(items[7:], 3)


def role(rng: random.Random, split: Split) -> Draft:
    """A post that one person holds at a time; past holders, deputies, others' posts, and memberships that do not exclude."""
    a, b = _two(rng, v.part(v.PEOPLE, split))
    org, other_org = _two(rng, v.part(v.ORGANISATIONS, split))
    post, other_post = _two(rng, v.part(v.ROLES, split) if split == "train" else v.ROLES[6:])
    holds = rng.choice([f"{a} is the {post} of {org}", f"the {post} of {org} is {a}", f"{org} has {a} as its {post}"])
    return holds, [
        (
            rng.choice([f"{b} is the {post} of {org}", f"{org}'s {post} is {b}", f"{b} serves as {post} of {org}"]),
            C,
            "unique-role",
        ),
        (
            rng.choice(
                [
                    f"{a} is not the {post} of {org}",
                    f"{a} has never been {post} of {org}",
                    f"the post of {post} at {org} is vacant",
                    f"{a} stepped down as {post} of {org}; {b} took over",
                ]
            ),
            C,
            "unique-role",
        ),
        (
            rng.choice(
                [
                    f"{a} works for {org} as its {post}",
                    f"{org} is led on this by its {post}, {a}",
                    f"as {post} of {org}, {a} signs the letters",
                    f"{a}, {post} of {org}",
                ]
            ),
            E,
            "paraphrase",
        ),
        (
            rng.choice(
                [
                    f"{b} is the deputy {post} of {org}",
                    f"{b} is the {other_post} of {org}",
                    f"{b} is the assistant to the {post} of {org}",
                ]
            ),
            N,
            "role",
        ),
        (
            rng.choice(
                [f"{b} is the {post} of {other_org}", f"{a} sits on the board of {other_org}", f"{b} works at {org}"]
            ),
            N,
            "non-unique",
        ),
        (
            rng.choice(
                [
                    f"{b} was {post} of {org} until 2015",
                    f"in the nineties the {post} of {org} was {b}",
                    f"{b} used to be the {post} of {org}",
                    f"{b} is a former {post} of {org}",
                ]
            ),
            N,
            "time",
        ),
        (
            rng.choice(
                [
                    f"{b} would like to be {post} of {org}",
                    f"some say {b} could be the next {post} of {org}",
                    f"who is the {post} of {org}?",
                    f"{b} will take over as {post} of {org} in two years",
                ]
            ),
            N,
            "plan",
        ),
    ]


def compared(rng: random.Random, split: Split) -> Draft:
    """Comparatives: turned round, converse, equal, a third party."""
    more, less, things = rng.choice(v.COMPARED[:6] if split == "train" else v.COMPARED[6:])
    if rng.random() < 0.5:
        more, less = less, more
    a, b, c = rng.sample(things, 3)
    anchor = rng.choice([f"{a} is {more} than {b}", f"of the two, {a} and {b}, {a} is the {more} one"])
    return anchor, [
        (f"{b} is {more} than {a}", C, "comparative"),
        (
            rng.choice(
                [
                    f"{a} is {less} than {b}",
                    f"{a} is not {more} than {b}, quite the opposite",
                    f"{a} is clearly {less} than {b}",
                ]
            ),
            C,
            "comparative",
        ),
        (
            rng.choice([f"{a} is no {more} than {b}", f"{a} and {b} come out exactly equal, neither is {more}"]),
            C,
            "comparative",
        ),
        (
            rng.choice(
                [
                    f"{b} is {less} than {a}",
                    f"compared with {a}, {b} is {less}",
                    f"{b} is the {less} one of {a} and {b}",
                ]
            ),
            E,
            "comparative",
        ),
        (f"{c} is {more} than {a}", N, "comparative"),
        (f"{b} is {more} than {c}", N, "comparative"),
        (
            rng.choice(
                [
                    f"{a} is not the {'most ' + more.removeprefix('more ') if more.startswith('more ') else more} of them all, {c} is",
                    f"is {b} {more} than {a}?",
                    f"ten years ago {b} was {more} than {a}",
                ]
            ),
            N,
            "time",
        ),
    ]


def relation(rng: random.Random, split: Split) -> Draft:
    """Who did it to whom: role swap, passive, converse, third parties."""
    active, passive, converse = rng.choice(v.RELATIONS[:8] if split == "train" else v.RELATIONS[8:])
    pool = v.part(v.PEOPLE, split) if rng.random() < 0.5 else v.part(v.ORGANISATIONS, split)
    a, b, c = rng.sample(pool, 3)
    items = [
        (rng.choice([f"{b} {active} {a}", f"{a} {passive} {b}"]), C, "role-swap"),
        (
            rng.choice([f"{a} never {active} {b}", f"it is not true that {a} {active} {b}", f"nobody {active} {b}"]),
            C,
            "negation",
        ),
        (f"{b} {passive} {a}", E, "passive"),
        (rng.choice([f"{c} {active} {a}", f"{a} {active} {c}", f"{c} {passive} {b}"]), N, "entity"),
        (
            rng.choice(
                [
                    f"{a} and {b} have known each other for years",
                    f"{c} heard about {a} and {b}",
                    f"did {b} really say that about {a}?",
                ]
            ),
            N,
            "additive",
        ),
    ]
    if converse:
        items.append((f"{b} {converse} {a}", E, "role-converse"))
        items.append((f"{a} {converse} {b}", C, "role-swap"))
    return f"{a} {active} {b}", items


def located(rng: random.Random, split: Split) -> Draft:
    """Where someone or something is, and properties that a thing has one of."""
    if rng.random() < 0.5:
        a, b = _two(rng, v.part(v.PEOPLE, split))
        here, there = _two(rng, v.TOWNS[:10] if split == "train" else v.TOWNS[10:])
        return f"{a} is in {here} right now", [
            (f"{a} is in {there} at the moment", C, "place"),
            (f"{a} is not in {here}", C, "negation"),
            (f"{a} is currently in {here}", E, "paraphrase"),
            (
                rng.choice(
                    [
                        f"{a} was in {there} last week",
                        f"{a} was born in {there}",
                        f"{a} has a cousin in {there}",
                        f"{a} will be in {there} next month",
                    ]
                ),
                N,
                "time",
            ),
            (f"{b} is in {there} right now", N, "entity"),
        ]
    verb, values = rng.choice(v.PROPERTIES)
    x, y = _two(rng, v.part(v.SUBJECTS["thing"], split))
    one, other = rng.sample(values, 2)
    return f"{x} {verb} {one}", [
        (f"{x} {verb} {other}", C, "entity"),
        (
            rng.choice(
                [
                    f"{x} {verb} {other}, not {one}",
                    f"it is not {one} that {x} {verb}",
                    f"whoever says that {x} {verb} {one} is wrong",
                ]
            ),
            C,
            "negation",
        ),
        (
            rng.choice(
                [
                    f"as far as we know, {x} {verb} {one}",
                    f"{x}, which {verb} {one}, belongs to us",
                    f"note that {x} {verb} {one}",
                ]
            ),
            E,
            "paraphrase",
        ),
        (f"{y} {verb} {other}", N, "entity"),
        (
            rng.choice(
                [
                    f"the box of {x} {verb} {other}",
                    f"before the refit, {x} was said to be different: {other}",
                    f"someone suggested {other} for {x}",
                ]
            ),
            N,
            "additive",
        ),
    ]


EVENTIVE = [  # (anchor, cannot both hold, means the same by double negation)
    ("{x} passed the inspection", "{x} failed the inspection", "{x} did not fail the inspection"),
    ("{x} arrived on time", "{x} arrived two hours late", "{x} was not late"),
    ("{x} remembered to lock up", "{x} forgot to lock up", "{x} did not forget to lock up"),
    ("{x} succeeded in reaching the summit", "{x} failed to reach the summit", "{x} did not fail to reach the summit"),
    ("{x} accepted the offer", "{x} turned the offer down", "{x} did not refuse the offer"),
    ("{x} kept the promise", "{x} broke the promise", "{x} never broke the promise"),
    ("{x} attended the hearing", "{x} missed the hearing", "{x} did not miss the hearing"),
    ("{x} survived the crash", "{x} was killed in the crash", "{x} did not die in the crash"),
    ("{x} agreed with the findings", "{x} disputed the findings", "{x} did not disagree with the findings"),
    ("{x} finished the course", "{x} dropped out of the course", "{x} did not drop out of the course"),
    ("{x} denied the charges", "{x} admitted the charges", "{x} did not admit to anything"),
    ("{x} won the match", "{x} lost the match", "{x} did not lose the match"),
]


def happened(rng: random.Random, split: Split) -> Draft:
    """Things done or not done: opposite outcome, negation, double negation, other person, other occasion, report, wish."""
    told, opposite, twice = rng.choice(EVENTIVE[:8] if split == "train" else EVENTIVE[8:])
    a, b = _two(rng, v.part(v.PEOPLE, split))
    if rng.random() < 0.4:
        told, opposite = opposite, told
        twice = f"it is not true that {opposite}"
    anchor = told.format(x=a)
    return anchor, [
        (opposite.format(x=a), C, "antonym"),
        (
            rng.choice(
                [
                    f"it is not true that {anchor}",
                    f"at no point was it so that {anchor}",
                    f"contrary to reports, it is wrong that {anchor}",
                ]
            ),
            C,
            "negation",
        ),
        (twice.format(x=a), E, "double-negation"),
        (
            rng.choice(
                [
                    f"it cannot be denied that {anchor}",
                    f"there is no doubt that {anchor}",
                    f"it is not the case that {opposite.format(x=a)}",
                ]
            ),
            E,
            "double-negation",
        ),
        (opposite.format(x=b), N, "entity"),
        (
            rng.choice(
                [
                    f"in 2012, on another occasion, {opposite.format(x=a)}",
                    f"some had feared that {opposite.format(x=a)}",
                    f"what if {opposite.format(x=a)}?",
                    f"{b} bet that {opposite.format(x=a)}",
                ]
            ),
            N,
            "hypothetical",
        ),
        (f"{a} and {b} talked about it afterwards", N, "additive"),
    ]
