"""Templates about states told as symbols, about statements that replace others, and about what a negation reaches.

By the rule of feeds an update or a correction that says otherwise contradicts the older statement; one about another thing or
another time, or one that confirms, does not, however alike it opens.
"""

import random

from training.verifier import vocabulary as v
from training.verifier import vocabulary_updates as u
from training.verifier.examples import CONTRADICTION as C
from training.verifier.examples import ENTAILMENT as E
from training.verifier.examples import NEUTRAL as N
from training.verifier.examples import Split
from training.verifier.frames import Draft, draft, read_frames

SYMBOLIC = read_frames("""
A anchor:
    {key} of {x}: {one}
    {x}, {key}={one}
    {x}: {key} is {one}
    the {key} of {x} is {one}
    {x} {key} -> {one}
    ~ {x} / {key} / {one}
    ~ reading of {x}, {key}: "{one}"
C status:
    {key} of {x}: {other}
    {x}, {key}={other}
    {x} {key} -> {other}
    ~ {x} / {key} / {other}
    ~ reading of {x}, {key}: "{other}"
C status:
    the {key} of {x} is {other}
    {x} reports {key} {other}
    {x} is {other}
    ~ as to its {key}, {x} shows {other}
    ~ looking at {x} I see {other} for the {key}
C negation:
    the {key} of {x} is not {one}
    {x}: {key} != {one}
    {x} is not {one}
    ~ {one} is not what {x} shows as its {key}
    ~ {x} has any {key} but {one}
C correction:
    {x}: {key} changed from {one} to {other}
    {x}: {key} {one} -> {other}
    event: {x} went {other}
    ~ {key} of {x} flipped, {one} gone, {other} in its place
    ~ log of {x}, {key} set to {other} just now
E paraphrase:
    {x} is {one}
    {x} reports {key} {one}
    {key}({x}) = {one}
    event: {x} went {one}
    {x} {key} -> {one}
    {x}: {key}={one} since noon
    ~ as to its {key}, {x} shows {one}
    ~ looking at {x} I see {one} for the {key}
E double-negation:
    {x}: {key} != {other}
    the {key} of {x} is not {other}
    {x} is not {other}
    ~ {other} is not what {x} shows as its {key}
E status:
    {x}: {key} changed from {other} to {one}
    {x}: {key} {other} -> {one}
    ~ {key} of {x} flipped, {other} gone, {one} in its place
N entity:
    {key} of {y}: {other}
    {y}, {key}={other}
    the {key} of {y} is {other}
    {y}: {key} changed from {one} to {other}
    ~ {y} / {key} / {other}
    ~ reading of {y}, {key}: "{other}"
N entity:
    {y} is not {one}
    {y} {key} -> {other}
    event: {y} went {other}
    {y} reports {key} {other}
    the {key} of {y} is not {one}
    {y}: {key} != {one}
    ~ as to its {key}, {y} shows {other}
N additive:
    {x}, {second}={value}
    {second} of {x}: {value}
    ~ {x} / {second} / {value}
N time:
    last week the {key} of {x} was {other}
    {x}, {key}={other} in the snapshot of 2 January
    {x} was {other} before the restart in spring
    ~ according to an archived record of 2021, {x} had {key} {other}
    ~ {x} started out as {other} when it was installed
N scope:
    default {key} of {x}: {other}
    {x}: allowed values of {key} are {one} and {other}
    {x}, expected_{key}={other}
    ~ factory setting for the {key} of {x}: {other}
    ~ the manual lists {other} among what {x} can have as its {key}
N plan:
    request: set {key} of {x} to {other}
    is {x} {other}?
    {x} will be {other} after tonight's work
    alert if {x} is {other}
    ~ scheduled for Sunday: {key} of {x} to become {other}
    ~ tell me as soon as {x} shows {other}
""")


def symbolic(rng: random.Random, split: Split) -> Draft:
    """Keys and values told in text, in several notations and in prose; another thing, another key, a default, the past, a request."""
    things, key, values, second, seconds = rng.choice(v.part(u.SYMBOLS, split))
    x, y = rng.sample(things, 2)
    one, other = rng.sample(values, 2)
    slots = {
        "x": x,
        "y": y,
        "key": key,
        "one": one,
        "other": other,
        "second": second,
        "value": rng.choice(seconds),
    }
    return draft(rng, split, SYMBOLIC, slots, most={C: 3, E: 2, N: 4})


SUPERSEDED = read_frames("""
A anchor:
    {x} {pred} {one}
    {x} {pred} {one}
    update: {x} now {pred} {one}
    note: {x} {pred} {one}
    ~ it has been announced that {x} {pred} {one}
    ~ revised notice: {x} {pred} {one}
C correction:
    update: {x} now {pred} {other}
    update: {x} {pred} {other}
    UPDATE - {x} {pred} {other} with immediate effect
    ~ new information: {x} {pred} {other}
    ~ revised notice: {x} {pred} {other}
C correction:
    correction: {x} {pred} {other}
    correction: {x} {pred} {other}, not {one}
    sorry, wrong: {x} {pred} {other}
    correction: it is not {x} but {y} that {pred} {one}
    ~ erratum: {x} {pred} {other} and not {one}
    ~ we misinformed you, {x} {pred} {other}
    ~ erratum: {y}, and not {x}, {pred} {one}
C correction:
    {x} no longer {pred} {one}
    {x} no longer {pred} {one}, it now {pred} {other}
    {x} no longer {pred} {one} but {other}
    as of today {x} {pred} {other} instead of {one}
    ~ it used to be {one}, these days {x} {pred} {other}
    ~ what you knew is outdated: {x} {pred} {other}
    ~ {one} was dropped, {x} {pred} {other} from this hour on
E correction:
    update: nothing has changed, {x} still {pred} {one}
    update: {x} {pred} {one} as before
    update: after the review, {x} continues as it was and {pred} {one}
    ~ new information: none, {x} goes on as it was and {pred} {one}
    ~ revised notice, same content: {x} {pred} {one}
E correction:
    correction: it is not {y} but {x} that {pred} {one}
    correction: {x} {pred} {one}, not {other}
    the correction was withdrawn, {x} {pred} {one} after all
    ~ erratum: {x} {pred} {one} and not {other}
    ~ whoever wrote {other} was misinformed, {x} {pred} {one}
E correction:
    {x} no longer {pred} {other}
    {x} no longer {pred} {other}, it now {pred} {one}
    {x} now {pred} {one} instead of {other}
    ~ it used to be {other}, these days {x} {pred} {one}
    ~ {other} was dropped, {x} {pred} {one} from this hour on
N entity:
    update: {y} now {pred} {other}
    update: {y} {pred} {other}
    UPDATE - {y} {pred} {other} with immediate effect
    ~ new information: {y} {pred} {other}
    ~ revised notice: {y} {pred} {other}
N entity:
    correction: {y} {pred} {other}
    correction: {y} {pred} {other}, not {one}
    sorry, wrong: {y} {pred} {other}
    as of today {y} {pred} {other} instead of {one}
    {y} no longer {pred} {one}, it now {pred} {other}
    {y} no longer {pred} {one}
    ~ erratum: {y} {pred} {other} and not {one}
    ~ it used to be {one}, these days {y} {pred} {other}
N time:
    correction to the report on last year: {x} {past} {other} then
    in 2016 {x} {past} {other}
    {x} {past} {other} until the change two years ago
    ~ erratum in the chronicle: ten winters ago {x} {past} {other}
    ~ former arrangement, for the archive: {x} {past} {other}
N plan:
    update: from next year {x} will {bare} {other}
    should {x} {bare} {other} in future?
    the committee may decide that {x} should {bare} {other}
    ~ advance notice: in five months {x} is going to {bare} {other}
    ~ one idea on the table is for {x} to {bare} {other}
N additive:
    update: more details about {x} will follow
    correction: a name in the text about {x} was misspelled
    update: the page about {x} has a new picture
    correction: the photograph shows {y}, not {x}
    ~ revised notice: the notes on {x} have moved to another shelf
    ~ erratum: the caption under {x} had a typing mistake
""")


def superseded(rng: random.Random, split: Split) -> Draft:
    """Updates, corrections and "no longer": what replaces the older statement, what confirms it, what speaks of something else."""
    things, (pred, past, bare), values = rng.choice(v.part(u.CHANGEABLE, split))
    x, y = rng.sample(things, 2)
    one, other = rng.sample(values, 2)
    slots = {"x": x, "y": y, "pred": pred, "past": past, "bare": bare, "one": one, "other": other}
    anchor, items = draft(rng, split, SUPERSEDED, slots, most={C: 3, E: 2, N: 4})
    return _tidied(anchor), [(_tidied(text), label, kind) for text, label, kind in items]


def _tidied(text: str) -> str:
    """ "Is" goes before the adverb where other verbs go after it."""
    for adverb in ("no longer", "still", "now"):
        text = text.replace(f"{adverb} is ", f"is {adverb} ")
    return text


ONLY = read_frames("""
A anchor:
    {a} {did} {what}
    {a} {did} {what} on Tuesday
    ~ it is on record that {a} {did} {what}
    ~ {a} {did} {what} in the afternoon
C negation:
    {a} did not {bare} {what}
    {a} never {did} {what}
    {a} did not {bare} {what}, only {else_}
    ~ {a} {did} {else_}, but {what} not at all
    ~ {what} was left alone by {a}, who only {did} {else_}
C cause:
    {a} did not {bare} {what}, because there was no time
    because of the rain {a} did not {bare} {what}
    {a} did not {bare} {what} for lack of money
    ~ since nobody had the keys, {a} did not {bare} {what}
    ~ {a} failed to {bare} {what} owing to an illness
C negation:
    nobody {did} {what}, not even {a}
    {b} and not {a} {did} {what}
    it was not {a} who {did} {what} but {b}
    ~ {b} {did} {what}, {a} had no part in it
    ~ neither {a} nor anybody else {did} {what}
E scope:
    {a} {did} not only {what} but also {else_}
    not only did {a} {bare} {what}, {b} watched it as well
    {a} did not just {bare} {what}, {a} {did} {else_} too
    ~ {a} did more than {bare} {what}: {else_} was next
    ~ it was not {what} alone that {a} {did}, but {else_} as well
E scope:
    {a} did not {bare} {what} because {reason} but because it had to be done
    it was not because {reason} that {a} {did} {what}
    {a} {did} {what}, though not because {reason}
    {a} did not {bare} {what} to please anyone; it was simply necessary
    ~ that {reason} was not why {a} {did} {what}
    ~ when {a} {did} {what}, it was not on the ground that {reason}
E scope:
    it was not {b} who {did} {what} but {a}
    {a} and not {b} {did} {what}
    not even {b} could keep {a} from it, {a} {did} {what}
    although there was no time, {a} {did} {what}
    {a}, not {b}, {did} {what}
    {a} did not {bare} {what} without thinking about it first
    ~ {a} {did} {what}, {b} had no part in it
    ~ no one but {a} {did} {what}
N scope:
    {a} did not {bare} {else_}
    {a} never {did} {else_}
    {a} did not {bare} {else_}, because there was no time
    because of the rain {a} did not {bare} {else_}
    not even {a} {did} {else_}
    ~ {else_} was left alone by {a}
    ~ {a} failed to {bare} {else_}
N entity:
    {b} did not {bare} {what}
    not everyone {did} {what}
    not all of them {did} {what}
    not even {b} {did} {else_}
    it was not {b} who {did} {else_}
    {b} did not {bare} {what} for lack of money
    ~ {b} failed to {bare} {what}
    ~ there are some who never {did} {what}
N time:
    {a} did not {bare} {what} in 2017
    the summer before, {a} had not {done} {what}
    ~ on an earlier visit {a} had not {done} {what}
N more-specific:
    {a} did not {bare} {what} in a hurry
    {a} did not tell anyone about {what}
    {a} had not been asked to {bare} {what}
    ~ {a} was not paid to {bare} {what}
    ~ {a} did not enjoy the day with {what}
""")
PART = read_frames("""
A anchor:
    {part} of {whole} is {is_}
    ~ at present {part} of {whole} is {is_}
C negation:
    {part} of {whole} is not {is_}
    not even {part} of {whole} is {is_}
    ~ {is_} is one thing that {part} of {whole} is not
C negation:
    no part of {whole} is {is_}
    nothing in {whole} is {is_}, neither {part} nor {rest}
    ~ {whole} has no corner that is {is_}
C scope:
    all of {whole} is {is_} except {part}
    {whole} is {is_}, but not {part}
    ~ apart from {part}, {whole} is {is_} throughout
E scope:
    not only {part} of {whole} is {is_}
    all of {whole} is {is_}, {part} included
    all of {whole} is {is_} except {rest}
    no part of {whole} is other than {is_}
    not just {part} but also {rest} of {whole} is {is_}
    ~ {part} of {whole} is {is_}, and it does not stop there
E scope:
    it is not so that nothing in {whole} is {is_}
    {whole} is not free of places that are {is_}
    ~ {whole} is {is_} in one part if not in others
N partial:
    not all of {whole} is {is_}
    {whole} is not entirely {is_}
    {whole} is not {is_} everywhere
    ~ {whole} is {is_} in places, not throughout
    ~ it is not the whole of {whole} that is {is_}
N partial:
    {rest} of {whole} is not {is_}
    ~ {rest} of {whole} is anything but {is_}
N scope:
    {part} of {whole} is not always {is_}
    {part} of {whole} need not stay {is_}
    {part} of {other} is not {is_}
    ~ {part} of {whole} has not been {is_} for long
    ~ over at {other}, {part} is not {is_}
""")
BOUND = read_frames("""
A anchor:
    {x} took {n} {unit}
    ~ from start to finish {x} took {n} {unit}
C quantifier:
    {x} took no longer than {low} {unit}
    {x} did not take longer than {low} {unit}
    {x} lasted no more than {low} {unit}
    ~ within {low} {unit} {x} was over
C quantifier:
    {x} took no less than {high} {unit}
    {x} was not over before {high} {unit} had gone by
    ~ not until {high} {unit} had passed was {x} over
C negation:
    {x} did not take {n} {unit}
    {x} did not even take {low} {unit}
    ~ {n} {unit} is not how long {x} took
E quantifier:
    {x} took no longer than {high} {unit}
    {x} did not take longer than {high} {unit}
    {x} lasted no more than {high} {unit}
    ~ within {high} {unit} {x} was over
E quantifier:
    {x} took no less than {low} {unit}
    {x} was not over before {low} {unit} had gone by
    {x} did not take {high} {unit}
    ~ not until {low} {unit} had passed was {x} over
N entity:
    {y} took no longer than {low} {unit}
    {y} did not take {n} {unit}
    ~ {y}, by contrast, was over within {low} {unit}
N number-other:
    no more than {low} people were needed for {x}
    {x} cost no more than {low} euros
    ~ not above {low} guests came to {x}
N time:
    {x} no longer takes place in winter
    {x} must never again take longer than {low} {unit}
    last time {x} took no longer than {low} {unit}
    ~ on the occasion before, {x} was over within {low} {unit}
""")


def reach(rng: random.Random, split: Split) -> Draft:
    """What a negation denies: not only, not because, not all, no longer than; denials of another part, reason or person."""
    kind = rng.random()
    if kind < 0.5:
        did, bare, done, (what, else_) = rng.choice(v.part(u.DEEDS, split))
        if rng.random() < 0.5:
            what, else_ = else_, what
        a, b = rng.sample(v.part(v.PEOPLE, split), 2)
        reason = rng.choice(v.part(u.REASONS, split))
        slots: dict[str, object] = {"a": a, "b": b, "did": did, "bare": bare, "done": done, "reason": reason}
        return draft(rng, split, ONLY, slots | {"what": what, "else_": else_}, most={C: 2, E: 2, N: 3})
    if kind < 0.75:
        wholes, parts, states = rng.choice(v.part(u.PARTS, split))
        whole, other = rng.sample(wholes, 2)
        part, rest = rng.sample(parts, 2)
        slots = {"whole": whole, "other": other, "part": part, "rest": rest, "is_": rng.choice(states)}
        return draft(rng, split, PART, slots)
    x, y = rng.sample([event for event in v.part(v.EVENTS, split) if "deadline" not in event], 2)
    n = rng.choice([rng.randint(10, 59), rng.randint(60, 200)])
    off = max(2, n // rng.choice([2, 3, 5]))
    slots = {"x": x, "y": y, "n": n, "low": n - off, "high": n + off, "unit": rng.choice(["minutes", "hours", "days"])}
    return draft(rng, split, BOUND, slots, most={C: 2, E: 2, N: 2})
