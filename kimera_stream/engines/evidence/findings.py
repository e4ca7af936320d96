"""Two statements side by side: what clashes, what agrees, and what says that they speak of different things."""

from dataclasses import dataclass, field

from kimera_stream.engines.evidence.lexicon import ANTONYMS, COHORTS
from kimera_stream.engines.evidence.quantities import Quantity
from kimera_stream.engines.evidence.reading import Reading

FEATURES = (
    "cosine",
    "shared",
    "contained",
    "only_a",
    "only_b",
    "polarity_clash",
    "polarity_agree",
    "negations_differ",
    "antonym_clash",
    "antonym_agree",
    "cohort_clash",
    "number_clash",
    "number_agree",
    "number_apart",
    "amount_clash",
    "calendar_clash",
    "calendar_agree",
    "ordinal_clash",
    "id_shared",
    "id_differ",
    "name_shared",
    "name_only_a",
    "name_only_b",
    "quantifier_clash",
    "quantifier_agree",
    "roles_swapped",
    "relation_swapped",
    "question",
    "command",
    "hypothetical",
    "plan_differs",
    "past_differs",
    "reported",
    "supersedes",
    "both_past",
    "both_plan",
    "single_difference",
    "same_words",
    "length_ratio",
    "negation_any",
)
"""Names of the features, in the order of ``Findings.features``; the first, cosine, is filled in by the caller."""

_CLASH_KINDS = {"clock": "time", "date": "date", "weekday": "weekday", "year": "year", "month": "month"}
_CALENDAR = frozenset(_CLASH_KINDS)
_QUANTIFIER_CLASHES = frozenset(
    frozenset(pair) for pair in (("all", "none"), ("all", "not_all"), ("none", "some"), ("none", "all"))
)


@dataclass(slots=True)
class Findings:
    """What comparing two readings found.

    Attributes:
        features: Values by the names in ``FEATURES``.
        clashes: (kind, words of a, words of b), for explanations.
        differences: Plain words on what suggests that the statements are about different things.
    """

    features: dict[str, float]
    clashes: list[tuple[str, str, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def compare(a: Reading, b: Reading) -> Findings:
    """Findings of a pair; symmetric but for the side that each word is on."""
    values = dict.fromkeys(FEATURES, 0.0)
    found = Findings(values)
    shared = a.words.keys() & b.words.keys()
    only_a, only_b = a.words.keys() - shared, b.words.keys() - shared
    _polarity(a, b, shared, found)
    explained_a, explained_b = _opposites(a, b, only_a, only_b, shared, found)
    _numbers(a, b, found)
    _names(a, b, found)
    _mood(a, b, found)
    least = max(1, min(len(a.words), len(b.words)))
    values["shared"] = len(shared) / max(1, len(a.words.keys() | b.words.keys()))
    values["contained"] = len(shared) / least
    values["only_a"] = min(1.0, len(only_a - explained_a) / 6)
    values["only_b"] = min(1.0, len(only_b - explained_b) / 6)
    values["length_ratio"] = least / max(1, len(a.words), len(b.words))
    values["same_words"] = float(not (only_a - explained_a) and not (only_b - explained_b))
    values["single_difference"] = float(
        len(only_a) <= 1 and len(only_b) <= 1 and len(only_a) + len(only_b) > 0 and len(shared) >= 2
    )
    _roles(a, b, shared, found)
    return found


def _polarity(a: Reading, b: Reading, shared: set[str], found: Findings) -> None:
    clash = [word for word in shared if a.words[word] != b.words[word]]
    agree = [word for word in shared if a.words[word] == b.words[word] == -1]
    values = found.features
    values["polarity_clash"] = min(1.0, len(clash) / max(1, len(shared)) * 1.5)
    values["polarity_agree"] = min(1.0, len(agree) / max(1, len(shared)))
    values["negations_differ"] = float((a.negations - b.negations) % 2 != 0)
    values["negation_any"] = float(bool(a.negations or b.negations))
    if clash:
        last = ([word for word in a.order if word in clash] or clash)[-1]
        word = a.written.get(last, last)
        one, other = (f"not {word}", word) if a.words[last] < 0 else (word, f"not {word}")
        found.clashes.append(("negation", one, other))


def _opposites(
    a: Reading, b: Reading, only_a: set[str], only_b: set[str], shared: set[str], found: Findings
) -> tuple[set[str], set[str]]:
    table, groups, values = ANTONYMS, COHORTS, found.features
    explained_a: set[str] = set()
    explained_b: set[str] = set()
    for word in sorted(each for each in only_a if each in table):
        for other in sorted(table[word] & only_b):
            explained_a.add(word)
            explained_b.add(other)
            if a.words[word] == b.words[other]:
                values["antonym_clash"] += 1
                found.clashes.append(("opposites", a.written.get(word, word), b.written.get(other, other)))
            else:
                values["antonym_agree"] += 1
    members = sorted(each for each in only_b - explained_b if each in groups)
    for word in sorted(each for each in only_a - explained_a if each in groups) if members else ():
        for other in members:
            common = groups[word] & groups[other]
            if common and a.words[word] == b.words[other] == 1:
                values["cohort_clash"] += 1
                found.clashes.append((min(common), a.written.get(word, word), b.written.get(other, other)))
                break
    for name in ("antonym_clash", "antonym_agree", "cohort_clash"):
        values[name] = min(2.0, values[name]) / 2
    return explained_a, explained_b


def _numbers(a: Reading, b: Reading, found: Findings) -> None:
    if not a.quantities and not b.quantities:
        return  # as most pairs
    values = found.features
    clashes: list[tuple[Quantity, Quantity]] = []
    agree = 0
    left = list(b.quantities)
    for mine in a.quantities:
        alike = [
            other
            for other in left
            if other.dimension == mine.dimension
            and (not mine.context or not other.context or mine.context == other.context)
        ]
        if not alike:
            continue
        match = next((other for other in alike if mine.agrees(other)), None)
        if match is not None:
            agree += 1
            left.remove(match)
            values["calendar_agree"] += mine.dimension in _CALENDAR
        else:
            clashes.append((mine, alike[0]))
    for mine, other in clashes:
        if mine.dimension in _CALENDAR:
            values["calendar_clash"] = 1.0
        elif mine.dimension == "ordinal":
            values["ordinal_clash"] = 1.0
        elif mine.dimension == "count":
            values["number_clash"] = 1.0
        else:
            values["amount_clash"] = 1.0
        kind = _CLASH_KINDS.get(mine.dimension, "number")
        found.clashes.append((kind, mine.text, other.text))
    others = [clash for clash in found.clashes if clash[0] not in _CLASH_KINDS.values()]
    if values["calendar_clash"] and others:
        found.differences.append("they speak of different times")
    values["number_agree"] = min(1.0, agree / 2)
    values["calendar_agree"] = min(1.0, values["calendar_agree"])
    unmatched = len(a.quantities) + len(b.quantities) - 2 * agree - 2 * len(clashes)
    values["number_apart"] = min(1.0, max(0, unmatched) / 3)


def _names(a: Reading, b: Reading, found: Findings) -> None:
    values = found.features
    values["id_shared"] = float(bool(a.ids & b.ids))
    if a.ids and b.ids and not (a.ids & b.ids):
        values["id_differ"] = 1.0
        found.differences.append(f"{min(a.ids)} and {min(b.ids)} are different things")
    elif (a.ids - b.ids) and (b.ids - a.ids):
        values["id_differ"] = 0.5
    if not a.names and not b.names:
        return
    lower_a = a.names | {written.lower() for written in a.written.values()}
    lower_b = b.names | {written.lower() for written in b.written.values()}
    only_a, only_b = a.names - lower_b, b.names - lower_a
    values["name_shared"] = min(1.0, len((a.names & lower_b) | (b.names & lower_a)) / 2)
    values["name_only_a"] = min(1.0, len(only_a) / 2)
    values["name_only_b"] = min(1.0, len(only_b) / 2)
    if only_a and only_b:
        found.clashes.append(("name", min(only_a).title(), min(only_b).title()))


def _mood(a: Reading, b: Reading, found: Findings) -> None:
    values = found.features
    values["question"] = float(a.question or b.question)
    values["command"] = float(a.command or b.command)
    values["hypothetical"] = float(a.hypothetical or b.hypothetical)
    values["plan_differs"] = float(a.plan != b.plan)
    values["past_differs"] = float(a.past != b.past)
    values["both_past"] = float(a.past and b.past)
    values["both_plan"] = float(a.plan and b.plan)
    values["reported"] = float(a.reported or b.reported)
    values["supersedes"] = float(a.supersedes or b.supersedes)
    quantifiers = frozenset((a.quantifier, b.quantifier))
    if quantifiers in _QUANTIFIER_CLASHES:
        values["quantifier_clash"] = 1.0
        found.clashes.append(("quantifier", a.quantifier.replace("_", " "), b.quantifier.replace("_", " ")))
    values["quantifier_agree"] = float(bool(a.quantifier) and a.quantifier == b.quantifier)
    for one in (a, b):
        if one.question:
            found.differences.append("one of them is a question")
        elif one.command:
            found.differences.append("one of them is an instruction")


def _roles(a: Reading, b: Reading, shared: set[str], found: Findings) -> None:
    """The same participants the other way round ("Ann hired Bob" and "Bob hired Ann"), unless voice explains it."""
    if len(shared) < 3 or found.features["contained"] < 0.75:
        return
    order_a = [word for word in dict.fromkeys(a.order) if word in shared]
    order_b = [word for word in dict.fromkeys(b.order) if word in shared]
    place = {word: position for position, word in enumerate(order_b)}
    swapped = order_a[0] == order_b[-1] or order_a[-1] == order_b[0]
    values = found.features
    if swapped and a.passive == b.passive:
        inversions = sum(place[one] > place[other] for i, one in enumerate(order_a) for other in order_a[i + 1 :])
        pairs = len(order_a) * (len(order_a) - 1) / 2
        values["roles_swapped"] = inversions / pairs
        if values["roles_swapped"] >= 0.5:
            first, last = a.written.get(order_a[0], order_a[0]), a.written.get(order_a[-1], order_a[-1])
            found.clashes.append(("roles", f"{first} ... {last}", f"{last} ... {first}"))
    values["relation_swapped"] = float(a.relations != b.relations)
