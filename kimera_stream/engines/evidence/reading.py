"""One statement as the rules read it: words with polarity, names, quantities, quantifiers, mood. Computed once per text."""

import re
from dataclasses import dataclass

from kimera_stream.engines.evidence.lexicon import (
    ALL,
    FUNCTION_WORDS,
    NEGATING_BEFORE_TO,
    NEGATING_VERBS,
    NEGATORS,
    NONE,
    PHRASES,
    PREDICATE_PARTICLES,
    SOME,
    stem,
)
from kimera_stream.engines.evidence.quantities import DIGIT, Quantity, quantities, words_of
from kimera_stream.infrastructure.caching import remembering

READINGS_BYTES = 32 << 20
"""Of readings that are kept, where the settings say nothing else: a stored statement is compared with each new one near it."""

_ID = re.compile(
    r"\b(?:v\d+(?:\.\d+)+|\d+(?:\.\d+){2,}|(?=[\w./-]*\d)(?=[\w./-]*[A-Za-z])[A-Za-z][\w-]*(?:[./-]\w+)*|[a-z]+(?:-[a-z]+)*-\d+[\w-]*)\b"
)
"""Tokens that mix letters and digits (db-1, eu-west-1, INC-3312, 4.12.0): names of things, compared exactly."""
_ORDINAL = re.compile(r"\d+(?:st|nd|rd|th|[ap]m|s)", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*(?:['’][A-Za-z]+)?|[,;:.!?()]|--|—")
_CLAUSE_END = frozenset(",;:.!?()—") | {"--"}
_CONJUNCTIONS = frozenset(
    [
        "but",
        "and",
        "because",
        "while",
        "although",
        "though",
        "whereas",
        "however",
        "since",
        "so",
        "yet",
        "or",
        "when",
        "if",
        "after",
        "before",
    ]
)
_NEGATION_REACH = 7
_NOT_NEGATING = re.compile(
    r"\bnot (?:only|just|merely|simply|to mention)\b|\bno (?:more|fewer|less|later|earlier|sooner) than\b|\bnot (?:more|fewer|less|later) than\b"
    r"|\bno doubt\b|\bno wonder\b|\bnothing but\b|\bno matter\b|\bnot until\b|\bwhether or not\b|\bif not\b",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"\?\s*$|^\s*(?:who|what|when|where|why|how|which|is|are|was|were|do|does|did|can|could|has|have|will|would|should)\s+"
    r"(?!.*[.]\s*$)(?=.*\?)",
    re.IGNORECASE,
)
_COMMAND = re.compile(
    r"^\s*(?:please\b|do not\b|don't\b|never\b(?=\s+[a-z]+\s+(?:the|a|an|any|your)\b)|always\b(?=\s+[a-z]+\s+(?:the|a|your)\b)|make sure|"
    r"remember\b|ensure\b|let's\b|let us\b|(?:check|restart|keep|ask|call|tell|page|bring|put|send|verify|confirm|remind|"
    r"book|order|turn|switch|open|close|stop|start|use|add|remove|move|leave|give|take|hold|wait|try|avoid|submit|report|"
    r"file|contact|notify|update|review|clean|wear|store|read|write|buy|return|pay|roll|reboot|deploy|drain|rotate|skip)\s+"
    r"(?:the|a|an|your|all|any|every|up|off|on|in|for|to|me|us|it|them|her|him|back|out|only|no|[a-z]+'s)\b)|"
    r"\b(?:should|ought to|had better)\b",
    re.IGNORECASE,
)
_HYPOTHETICAL = re.compile(
    r"\b(?:if|unless|might|(?<!\d )(?-i:may)(?! \d)|could|would|perhaps|possibly|maybe|in case|whether|hypothetically|suppose|supposing|imagine|"
    r"were to|hopes? to|hoping|wants? to|wishes|considering|thinking (?:about|of)|wondering|rumou?rs?|unclear|not sure)\b",
    re.IGNORECASE,
)
_PLAN = re.compile(
    r"\b(?:will|won't|shall|going to|gonna|plans?|planned|planning|scheduled|supposed to|intends?|expects?|expected|due to|"
    r"about to|aims? to|proposed|proposal|target(?:s|ed)?|forecast|tomorrow|next (?:week|month|year|quarter|season|\w+day)|upcoming|"
    r"later (?:today|this)|by the end of|from (?:next|\w+day|january|february|march|april|may|june|july|august|september|october|november|december)|soon)\b",
    re.IGNORECASE,
)
_PAST = re.compile(
    r"\b(?:used to|formerly|previously|former|last (?:week|month|year|night|spring|summer|autumn|winter|quarter|season|time|\w+day)|"
    r"yesterday|years? ago|months? ago|weeks? ago|days? ago|hours? ago|ago|earlier|until (?:recently|last)|originally|in the past|"
    r"back in|back then|at the time|once|had been|had|ex-\w+|before that|no longer|prior to)\b",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:says?|said|claims?|claimed|reported(?:ly)?|according to|believes?|believed|thinks?|thought|told|alleged(?:ly)?|"
    r"assumes?|assumed|suspects?|suspected|heard|asked|argues?|denies|denied|insists?|suggests?|supposedly|apparently|seems?)\b",
    re.IGNORECASE,
)
_CORRECTS = re.compile(
    r"^\s*(?:update|correction|edit|errata|erratum|amended|revised|scratch that|actually|as of (?:now|today)|effective (?:immediately|today|now))\b",
    re.IGNORECASE,
)
_SUPERSEDES = re.compile(
    r"\b(?:has since|have since|no longer|anymore|any more|since then|by now|as of (?:now|today)|now|instead|after all|changed to|moved to|"
    r"corrected|mistakenly|wrongly|in fact)\b",
    re.IGNORECASE,
)
_PASSIVE = re.compile(
    r"\b(?:is|are|was|were|been|being|be|gets?|got)\s+(?:\w+ly\s+)?\w+(?:ed|en|wn|lt|nt|id|ld|ght|ung|un|ot|ut)\b.*\bby\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class _Cue:
    """A pattern that is searched for only where one of the words is there without which it matches nothing: most texts have none,
    and a search takes ten times as long as a look at the words.

    Attributes:
        pattern: What is searched for.
        words: Whole words in small letters, one of which is in every match.
    """

    pattern: re.Pattern[str]
    words: frozenset[str]

    def among(self, words: frozenset[str] | None) -> bool:
        """Whether it may match a text of these words; None: they are not known."""
        return words is None or not self.words.isdisjoint(words)

    def heard(self, text: str, words: frozenset[str] | None) -> bool:
        """Whether it matches a text of these words."""
        return self.among(words) and self.pattern.search(text) is not None


def _cue(pattern: re.Pattern[str], words: str) -> _Cue:
    return _Cue(pattern, frozenset(words.split()))


CUES = {
    "not_negating": _cue(_NOT_NEGATING, "not no nothing whether if"),
    "command": _cue(
        _COMMAND,
        "please do don never always make remember ensure let check restart keep ask call tell page bring put send verify confirm "
        "remind book order turn switch open close stop start use add remove move leave give take hold wait try avoid submit "
        "report file contact notify update review clean wear store read write buy return pay roll reboot deploy drain rotate "
        "skip should ought had",
    ),
    "hypothetical": _cue(
        _HYPOTHETICAL,
        "if unless might may could would perhaps possibly maybe case whether hypothetically suppose supposing imagine were hope "
        "hopes hoping want wants wishes considering thinking wondering rumor rumors rumour rumours unclear sure",
    ),
    "plan": _cue(
        _PLAN,
        "will won shall going gonna plan plans planned planning scheduled supposed intend intends expect expects expected due "
        "about aim aims proposed proposal target targets targeted forecast tomorrow next upcoming later end from soon",
    ),
    "past": _cue(
        _PAST,
        "used formerly previously former last yesterday ago earlier until originally past back time once had ex before longer prior",
    ),
    "reported": _cue(
        _REPORTED,
        "say says said claim claims claimed reported reportedly according believe believes believed think thinks thought told "
        "alleged allegedly assume assumes assumed suspect suspects suspected heard asked argue argues denies denied insist "
        "insists suggest suggests supposedly apparently seem seems",
    ),
    "supersedes": _cue(
        _SUPERSEDES, "since longer anymore more now today instead all changed moved corrected mistakenly wrongly fact"
    ),
    "passive": _cue(_PASSIVE, "by"),
}
"""By what they tell of a statement."""
_NOT_NEGATING_CUE = CUES["not_negating"]
_ORDER_WORDS = frozenset(["than", "before", "after", "over", "under", "above", "below", "behind", "from", "to", "by"])


@dataclass(frozen=True, slots=True)
class Reading:
    """What the rules know of a statement.

    Attributes:
        words: Content stem -> polarity (+1 or -1; of its last mention).
        order: Content stems as they come, for roles.
        written: Stem -> the word as written, for explanations.
        names: Capitalised words inside a sentence, lower case.
        ids: Identifiers with digits, lower case ("db-1", "4.12.0", "flight 612").
        quantities: Amounts, times, dates.
        quantifier: ``all``, ``none``, ``some``, ``not_all`` or empty.
        negations: Number of negating words.
    """

    words: dict[str, int]
    order: tuple[str, ...]
    written: dict[str, str]
    names: frozenset[str]
    ids: frozenset[str]
    quantities: tuple[Quantity, ...]
    quantifier: str
    negations: int
    question: bool
    command: bool
    hypothetical: bool
    plan: bool
    past: bool
    reported: bool
    supersedes: bool
    passive: bool
    relations: frozenset[str]


def _cost(text: str, _reading: Reading) -> int:
    return 2_000 + 22 * len(text)  # measured: 2.2 KB for 60 characters, 8.7 for 500, 32 for 2,000


@remembering(max_bytes=READINGS_BYTES, cost=_cost)
def read(text: str) -> Reading:
    """Read one statement. Deterministic, less than a tenth of a millisecond for a short sentence."""
    text = text[:2000].replace("’", "'")
    said = words_of(text)
    ids: set[str] = set()

    def take(match: re.Match[str]) -> str:
        token = match.group()
        if not DIGIT.search(token) or _ORDINAL.fullmatch(token):
            return token
        ids.add(token.lower().rstrip("."))
        return " " * len(token)

    blanked = _ID.sub(take, text) if DIGIT.search(text) else text
    found, numbered, rest = quantities(blanked)
    ids.update(numbered)
    if _NOT_NEGATING_CUE.among(said):
        rest = _NOT_NEGATING.sub(lambda m: " " * len(m.group()), rest)
    tokens = _TOKEN.findall(rest)
    lowered = [token.lower() for token in tokens]
    words, order, written, names, negations = _polarities(tokens, lowered)
    heard = {name: cue.heard(text, said) for name, cue in CUES.items() if cue is not _NOT_NEGATING_CUE}
    return Reading(
        words=words,
        order=order,
        written=written,
        names=names,
        ids=frozenset(ids),
        quantities=tuple(found),
        quantifier=_quantifier(lowered),
        negations=negations,
        question="?" in text and _QUESTION.search(text) is not None,
        command=heard["command"],
        hypothetical=heard["hypothetical"],
        plan=heard["plan"],
        past=heard["past"],
        reported=heard["reported"],
        supersedes=heard["supersedes"] or _CORRECTS.match(text) is not None,
        passive=heard["passive"],
        relations=_ORDER_WORDS.intersection(lowered),
    )


def _polarities(
    tokens: list[str],
    small: list[str],
) -> tuple[dict[str, int], tuple[str, ...], dict[str, str], frozenset[str], int]:
    words: dict[str, int] = {}
    order: list[str] = []
    written: dict[str, str] = {}
    names: set[str] = set()
    polarity, reach, negations = 1, 0, 0
    sentence_start = True
    previous = ""
    copula = False
    for position, token in enumerate(tokens):
        if token in _CLAUSE_END:
            if token != ":":  # noqa: S105 - a mark of punctuation
                polarity, reach = 1, 0
            sentence_start = sentence_start or token in ".!?"  # noqa: S105 - as above
            previous = ""
            continue
        lowered = small[position]
        if lowered in _CONJUNCTIONS and lowered not in ("or", "and"):
            polarity, reach = 1, 0
        negates = lowered in NEGATORS or lowered.endswith("n't")
        key = stem(lowered)
        said = lowered in PREDICATE_PARTICLES and copula
        copula = key == "be" or (copula and (negates or lowered in FUNCTION_WORDS))
        if negates:
            negations += 1
            polarity, reach = -polarity if reach else -1, _NEGATION_REACH
        elif said or (lowered not in FUNCTION_WORDS and len(lowered) > 1):
            if token[0].isupper() and not sentence_start:
                names.add(lowered.removesuffix("'s"))
            words[key] = polarity
            order.append(key)
            written.setdefault(key, token)
            phrase = f"{previous}_{key}"
            if phrase in PHRASES:
                words[phrase] = polarity
                written.setdefault(phrase, f"{written.get(previous, previous)} {token}")
            before_to = position + 1 < len(tokens) and small[position + 1] == "to"
            if key in NEGATING_VERBS or (key in NEGATING_BEFORE_TO and before_to):
                negations += 1
                polarity, reach = -polarity if reach else -1, _NEGATION_REACH
        else:
            phrase = f"{previous}_{key}"
            if phrase in PHRASES:
                words[phrase] = polarity
                written.setdefault(phrase, f"{written.get(previous, previous)} {token}")
        if reach:
            reach -= 1
            if reach == 0:
                polarity = 1
        previous = key
        sentence_start = False
    return words, tuple(order), written, frozenset(names), negations


def _quantifier(lowered: list[str]) -> str:
    for position, word in enumerate(lowered):
        before = lowered[position - 1] if position else ""
        if word in ALL:
            return (
                "not_all"
                if before in ("not", "n't") or before.endswith("n't") or "without" in lowered[:position]
                else "all"
            )
        if word in NONE:
            return "none"
        if word in SOME:
            return "some"
    return ""
