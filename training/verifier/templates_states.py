"""Templates about states, roles, relations and events; each contradiction with matched statements that are none."""

import random

from training.verifier import vocabulary as v
from training.verifier.examples import CONTRADICTION as C
from training.verifier.examples import ENTAILMENT as E
from training.verifier.examples import NEUTRAL as N
from training.verifier.examples import Split
from training.verifier.frames import Draft, draft, read_frames


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    one, other = rng.sample(words, 2)
    return one, other


STATE = read_frames("""
A anchor:
    {x} is {is_}
    ~ right now {x} is {is_}
    ~ all morning {x} has been {is_}
C antonym:
    {x} is {anti}
    ~ unfortunately or not, {x} is {anti}
    ~ I find that {x} is {anti}
C negation:
    {x} is not {same}
    ~ {x} is surely not {same}
    ~ nobody could call {x} {same}
C negation:
    it is not true that {x} is {is_}
    {x} is anything but {same}
    by no means is {x} {is_}
    it is not the case that {x} is {is_}
    {x} isn't {same}
    it isn't true that {x} is {is_}
    {x} is not {is_}, on the contrary
    ~ {x} is far from {same}
    ~ it is a mistake to think that {x} is {is_}
C correction:
    {x} is no longer {is_}
    update: {x} is now {anti}
    correction: {x} is {anti}, not {is_}
    until recently {x} was {is_}, but now {anti}
    {x} was {is_} two years ago and is {anti} now
    {x} is currently {anti}
    ~ {x} has ceased to be {is_}
    ~ amended: {x} is {anti} and not {is_}
E double-negation:
    {x} is not {anti}
    it is not the case that {x} is {anti}
    {x} is no longer {anti}
    {x} isn't {anti} any more
    it is not true that {x} is {anti}
    {x} is anything but {anti}
    by no means is {x} {anti}
    update: {x} is now {is_}
    correction: {x} is {is_}, not {anti}
    ~ {x} is certainly not {anti}
    ~ it would be wrong to say that {x} is {anti}
E double-negation:
    it is false that {x} is not {is_}
    nobody denies that {x} is {is_}
    it isn't true that {x} isn't {same}
    ~ one cannot say that {x} is not {is_}
    ~ nobody would dispute that {x} is {is_}
E paraphrase:
    {x} is {same}
    {x} is currently {same}
    yes, {x} is {is_}
    confirmed: {x} is {same}
    ~ indeed {x} is {same}
    ~ I can vouch that {x} is {same}
N entity:
    {y} is {anti}
    update: {y} is now {anti}
    correction: {y} is {anti}, not {is_}
    {y} is currently {anti}
    ~ as for {y}, that one is {anti}
N entity:
    {y} is not {is_}
    it is not true that {y} is {is_}
    {y} is anything but {same}
    {y} is no longer {is_}
    by no means is {y} {is_}
    ~ {y}, on the other hand, is not {is_}
N time:
    last month {x} was {anti}
    {x} was {anti} back in 2019
    two years ago {x} was not {is_}
    until recently {x} was {anti}
    ~ in her grandmother's day {x} was {anti}
    ~ the spring before last {x} was not {is_}
N plan:
    {x} will be {anti} by next summer
    {x} might be {anti} next week
    from next year {x} will not be {is_}
    ~ they intend {x} to be {anti} some day
    ~ it is hoped that {x} will be {anti} after Easter
N question:
    is {x} {anti}?
    does anyone know if {x} is {anti}?
    if {x} is {anti}, call me
    we were asked whether {x} is {anti}
    ~ can somebody find out whether {x} is {anti}?
    ~ suppose that {x} were {anti}, what then?
N additive:
    everyone asks about {x}
    someone looked at {x} this morning
    {y} and {x} are not the same
    ~ a note about {x} lies on the desk
    ~ {y} and {x} are often confused
""")


def state(rng: random.Random, split: Split) -> Draft:
    """Opposite states: antonym, negation, double negation; other thing, other time, plan, question, doubt."""
    kept: Split = "train" if split == "train" else "test"
    pair = rng.choice([o for o in v.OPPOSITES if o.split == kept])
    one, other = (pair.one, pair.other) if rng.random() < 0.5 else (pair.other, pair.one)
    x, y = _two(rng, v.part(v.SUBJECTS[pair.on], split))
    slots = {"x": x, "y": y, "is_": rng.choice(one), "same": rng.choice(one), "anti": rng.choice(other)}
    return draft(rng, split, STATE, slots, most={C: 2, E: 2, N: 3})


ROLE = read_frames("""
A anchor:
    {a} is the {post} of {org}
    the {post} of {org} is {a}
    {org} has {a} as its {post}
    ~ the post of {post} at {org} is held by {a}
    ~ {a} occupies the chair of {post} at {org}
C unique-role:
    {b} is the {post} of {org}
    {org}'s {post} is {b}
    {b} serves as {post} of {org}
    ~ at {org}, {b} is {post}
    ~ {b} holds the office of {post} at {org}
C unique-role:
    {a} is not the {post} of {org}
    {a} has never been {post} of {org}
    the post of {post} at {org} is vacant
    {a} stepped down as {post} of {org}; {b} took over
    ~ {org} is without a {post}
    ~ {b} has replaced {a} as {post} of {org}
    ~ somebody other than {a} is {post} of {org}
E paraphrase:
    {a} serves {org} as its {post}
    {org} is led on this by its {post}, {a}
    as {post} of {org}, {a} signs the letters
    {a}, {post} of {org}
    ~ it is {a} who acts as {post} for {org}
    ~ in the capacity of {post}, {a} speaks for {org}
N role:
    {b} is the deputy {post} of {org}
    {b} is the {other_post} of {org}
    {b} is the assistant to the {post} of {org}
    {b} has never been {post} of {org}
    {b} is not the {post} of {org}
    ~ {b} stands in for the {post} of {org} on Fridays
    ~ the office of {other_post} at {org} belongs to {b}
N non-unique:
    {b} is the {post} of {other_org}
    {a} sits on the board of {other_org}
    {b} works at {org}
    {b} serves as {post} of {other_org}
    {b} stepped down as {other_post} of {org}
    {a} took over as {other_post} of {other_org}
    ~ {other_org} made {b} its {post}
    ~ {b} is among the staff of {org}
N time:
    {b} was {post} of {org} until 2015
    in the nineties the {post} of {org} was {b}
    {b} used to be the {post} of {org}
    {b} is a former {post} of {org}
    {b} stepped down as {post} of {org} years ago
    ~ {b} had been {post} of {org} for a decade before retiring
    ~ long ago {org} had {b} for a {post}
N plan:
    {b} would like to be {post} of {org}
    some say {b} could be the next {post} of {org}
    who is the {post} of {org}?
    {b} will take over as {post} of {org} in two years
    ~ {b} dreams of becoming {post} of {org}
    ~ {b} has applied to be {post} of {org} one day
""")


def role(rng: random.Random, split: Split) -> Draft:
    """A post that one person holds at a time; past holders, deputies, others' posts, and memberships that do not exclude."""
    a, b = _two(rng, v.part(v.PEOPLE, split))
    org, other_org = _two(rng, v.part(v.ORGANISATIONS, split))
    post, other_post = _two(rng, v.part(v.ROLES, split))
    slots = {"a": a, "b": b, "org": org, "other_org": other_org, "post": post, "other_post": other_post}
    return draft(rng, split, ROLE, slots)


COMPARED = read_frames("""
A anchor:
    {a} is {more} than {b}
    of the two, {a} and {b}, {a} is the {more} one
    ~ put {a} beside {b} and {a} is {more}
C comparative:
    {b} is {more} than {a}
    ~ {b} proves to be {more} than {a}
    ~ it is {b} that is {more}, not {a}
C comparative:
    {a} is {less} than {b}
    {a} is not {more} than {b}, quite the opposite
    {a} is clearly {less} than {b}
    ~ next to {b}, {a} is {less}
    ~ {a} does not come out {more} than {b} but {less}
C comparative:
    {a} is no {more} than {b}
    {a} and {b} come out exactly equal, neither is {more}
    ~ there is nothing between {a} and {b}, one is as {plain} as the other
E comparative:
    {b} is {less} than {a}
    compared with {a}, {b} is {less}
    {b} is the {less} one of {a} and {b}
    ~ held against {a}, {b} is {less}
    ~ between {a} and {b} it is {b} that is {less}
N comparative:
    {c} is {more} than {a}
    {a} and {c} come out exactly equal, neither is {more}
    {a} is no {more} than {c}
    ~ as for {c}, that one is {more} than {a}
N comparative:
    {b} is {more} than {c}
    {b} is clearly {less} than {c}
    ~ {b} is at least {more} than {c}
N time:
    {a} is not the {most} of them all, {c} is
    is {b} {more} than {a}?
    ten years ago {b} was {more} than {a}
    ~ would you say that {b} is {more} than {a}?
    ~ at the first count {b} had been {more} than {a}
""")


def compared(rng: random.Random, split: Split) -> Draft:
    """Comparatives: turned round, converse, equal, a third party."""
    more, less, things = rng.choice(v.part(v.COMPARED, split))
    if rng.random() < 0.5:
        more, less = less, more
    a, b, c = rng.sample(things, 3)
    long = more.startswith(("more ", "less "))
    slots = {
        "a": a,
        "b": b,
        "c": c,
        "more": more,
        "less": less,
        "most": f"{'most' if more.startswith('more') else 'least'} {more[5:]}" if long else more,
        "plain": more[5:] if long else "much so",
    }
    return draft(rng, split, COMPARED, slots)


RELATION = read_frames("""
A anchor:
    {a} {active} {b}
    ~ as everyone knows, {a} {active} {b}
C role-swap:
    {b} {active} {a}
    {a} {passive} {b}
    ~ the way it went, {b} {active} {a}
    ~ it is {a}, and nobody else, that {passive} {b}
C negation:
    {a} never {active} {b}
    it is not true that {a} {active} {b}
    nobody {active} {b}
    ~ it is made up that {a} {active} {b}
    ~ there is not a soul who {active} {b}
E passive:
    {b} {passive} {a}
    ~ in fact {b} {passive} {a}
N entity:
    {c} {active} {a}
    {a} {active} {c}
    {c} {passive} {b}
    {c} never {active} {b}
    it is not true that {c} {active} {b}
    ~ besides, {a} {active} {c}
    ~ {c}, too, {active} {a}
N additive:
    {a} and {b} have known each other for years
    {c} heard about {a} and {b}
    did {b} really say that about {a}?
    ~ {a} and {b} have met at a fair
    ~ {c} asked around after {b} and {a}
""")
CONVERSE = read_frames("""
E role-converse:
    {b} {converse} {a}
    ~ to put it the other way, {b} {converse} {a}
C role-swap:
    {a} {converse} {b}
    ~ put the other way, {a} {converse} {b}
""")


def relation(rng: random.Random, split: Split) -> Draft:
    """Who did it to whom: role swap, passive, converse, third parties."""
    active, passive, converse = rng.choice(v.part(v.RELATIONS, split))
    pool = v.part(v.PEOPLE, split) if rng.random() < 0.5 else v.part(v.ORGANISATIONS, split)
    a, b, c = rng.sample(pool, 3)
    slots = {"a": a, "b": b, "c": c, "active": active, "passive": passive, "converse": converse}
    return draft(rng, split, [*RELATION, *(CONVERSE if converse else ())], slots)


WHEREABOUTS = read_frames("""
A anchor:
    {a} is in {here} right now
    ~ {a} is staying in {here} today
C place:
    {a} is in {there} at the moment
    ~ as we speak {a} is in {there}
C negation:
    {a} is not in {here}
    ~ {a} is nowhere near {here}
E paraphrase:
    {a} is currently in {here}
    ~ {here} is where {a} is today
N time:
    {a} was in {there} last week
    {a} was born in {there}
    {a} has a cousin in {there}
    {a} will be in {there} next month
    ~ {a} grew up in {there}
    ~ {a} spent the winter in {there}
N entity:
    {b} is in {there} right now
    ~ {b} is staying in {there} today
""")
PROPERTY = read_frames("""
A anchor:
    {x} {verb} {one}
    ~ we know for a fact that {x} {verb} {one}
C entity:
    {x} {verb} {other}
    ~ looking closely, {x} {verb} {other}
C negation:
    {x} {verb} {other}, not {one}
    it is not {one} that {x} {verb}
    whoever says that {x} {verb} {one} is wrong
    ~ not {one} but {other} is right: {x} {verb} {other}
    ~ you are mistaken if you believe that {x} {verb} {one}
E paraphrase:
    as far as we know, {x} {verb} {one}
    {x}, which {verb} {one}, belongs to us
    note that {x} {verb} {one}
    whoever says that {x} {verb} {other} is wrong
    it is not {other} that {x} {verb}
    {x} {verb} {one}, not {other}
    ~ the label agrees that {x} {verb} {one}
    ~ somebody checked, and {x} {verb} {one}
N entity:
    {y} {verb} {other}
    {y} {verb} {other}, not {one}
    whoever says that {y} {verb} {one} is wrong
    ~ the neighbouring {y_bare} {verb} {other}
N additive:
    the box of {x} {verb} {other}
    before the refit, {x} was said to be different: {other}
    someone suggested {other} for {x}
    ~ the lid over {x} {verb} {other}
    ~ a friend proposed {other} for {x}
""")


def located(rng: random.Random, split: Split) -> Draft:
    """Where someone or something is, and properties that a thing has one of."""
    if rng.random() < 0.5:
        a, b = _two(rng, v.part(v.PEOPLE, split))
        here, there = _two(rng, v.part(v.TOWNS, split))
        return draft(rng, split, WHEREABOUTS, {"a": a, "b": b, "here": here, "there": there})
    verb, values = rng.choice(v.part(v.PROPERTIES, split))
    x, y = _two(rng, v.part(v.SUBJECTS["thing"], split))
    one, other = rng.sample(values, 2)
    slots = {"x": x, "y": y, "y_bare": y.removeprefix("the "), "verb": verb, "one": one, "other": other}
    return draft(rng, split, PROPERTY, slots)


HAPPENED = read_frames("""
A anchor:
    {told}
    ~ by all accounts {told}
C antonym:
    {opposite}
    ~ sad or not, {opposite}
C negation:
    it is not true that {told}
    at no point was it so that {told}
    contrary to reports, it is wrong that {told}
    ~ it is a rumour without ground that {told}
    ~ nothing of the kind: it never happened that {told}
E double-negation:
    {twice}
    ~ rest assured, {twice}
E double-negation:
    it cannot be denied that {told}
    there is no doubt that {told}
    it is not true that {opposite}
    contrary to reports, it is wrong that {opposite}
    it is not the case that {opposite}
    ~ no one can deny that {told}
    ~ it would be untrue to say that {opposite}
N entity:
    {opposite_b}
    it is not true that {told_b}
    contrary to reports, it is wrong that {told_b}
    ~ what is true of somebody else: {opposite_b}
N hypothetical:
    in 2012, on another occasion, {opposite}
    some had feared that {opposite}
    what if {opposite}?
    {b} bet that {opposite}
    ~ imagine that {opposite}
    ~ {b} dreamt that {opposite}
N additive:
    {a} and {b} talked about it afterwards
    ~ {a} told {b} the whole story over lunch
""")


def happened(rng: random.Random, split: Split) -> Draft:
    """Things done or not done: opposite outcome, negation, double negation, other person, other occasion, report, wish."""
    told, opposite, twice = rng.choice(v.part(v.EVENTIVE, split))
    a, b = _two(rng, v.part(v.PEOPLE, split))
    if rng.random() < 0.4:
        told, opposite = opposite, told
        twice = f"it is not so that {opposite}"
    slots = {
        "a": a,
        "b": b,
        "told": told.format(x=a),
        "opposite": opposite.format(x=a),
        "twice": twice.format(x=a),
        "opposite_b": opposite.format(x=b),
        "told_b": told.format(x=b),
    }
    return draft(rng, split, HAPPENED, slots)
