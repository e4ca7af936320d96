"""Antonyms from WordNet, put into sentences that people wrote: contradictions whose words no template chose.

WordNet 3.0 (Princeton University, WordNet licence) as Debian's package ``wordnet-base`` installs it. Only first senses count, and
only words that its tagged texts hold: the antonym of a rare sense is seldom the antonym of the word as it stands.

A sentence takes part where a predicate adjective ends a clause ("the gate was open."), because there the opposite cannot hold
beside it; before a noun it can ("an old man", "a young man"). Each gives what contradicts (the antonym, the word denied), what
agrees (the antonym denied) and what stands beside it (the antonym of another thing, asked, planned or reported).
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from training.verifier.clusters import Cluster, Item
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, Split, split_of

DIRECTORY = Path("/usr/share/wordnet")
_PREDICATE = re.compile(
    r"\b(?P<be>is|are|was|were) (?P<how>still |now |very |quite |completely )?(?P<word>[a-z]{3,})(?=[.,;]|$| (?:at|in|on|for|this|since|after|and)\b)"
)
_SUBJECT = re.compile(r"^(?:The|Our|Their|His|Her|My|This|That|All|Both|Most)\b")
_OTHERS = ("The other one", "The one next to it", "Its predecessor", "The spare")
_EXCEPT = frozenset(
    {
        "all",
        "black",
        "white",
        "same",
        "sure",
        "able",
        "other",
        "likely",
        "real",
        "right",
        "first",
        "last",
        "only",
        "more",
        "less",
        "most",
        "found",
        "known",
        "worse",
        "better",
    }
)


def read_adjectives(directory: Path = DIRECTORY) -> dict[str, str]:
    """Adjectives with a direct antonym in their first sense, and that antonym.

    Raises:
        FileNotFoundError: WordNet is not there; ``apt-get install wordnet-base``.
    """
    data = (directory / "data.adj").read_text(encoding="latin-1")
    senses: dict[str, tuple[list[str], list[tuple[int, str, int]]]] = {}
    for line in data.splitlines():
        if line.startswith("  "):
            continue
        head = line.split(" | ")[0].split()
        count = int(head[3], 16)
        words = [re.sub(r"\(.*\)", "", word) for word in head[4 : 4 + 2 * count : 2]]
        pointers = head[4 + 2 * count :]
        links: list[tuple[int, str, int]] = []
        for at in range(1, 1 + 4 * int(pointers[0]), 4):
            if pointers[at] == "!":
                ends = pointers[at + 3]
                links.append((int(ends, 16) // 256 - 1, pointers[at + 1], int(ends, 16) % 256 - 1))
        senses[head[0]] = words, links
    opposite: dict[str, str] = {}
    for line in (directory / "index.adj").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue
        parts = line.split()
        word, kinds = parts[0], int(parts[3])
        if int(parts[5 + kinds]) < 1 or not word.isalpha() or word in _EXCEPT:
            continue  # parts[5 + kinds]: senses that are ranked by the tagged texts
        words, links = senses[parts[6 + kinds]]
        lowered = [each.lower() for each in words]
        for mine, synset, its in links:
            if lowered[mine] == word:
                other = senses[synset][0][its].lower()
                if other.isalpha() and other not in _EXCEPT:
                    opposite[word] = other
    return opposite


def substituted_clusters(
    sentences: Iterable[str], opposite: Mapping[str, str], split: Split, seed: int
) -> Iterator[Cluster]:
    """One cluster for each sentence of ``split`` that says of one thing what an opposite could not hold beside.

    The split is that of the sentence and of the adjective alike, so that held-out figures are of unseen words in unseen sentences.
    """
    rng = random.Random(f"{seed}:wordnet")
    for sentence in sentences:
        if split_of(sentence) != split or not 4 <= len(sentence.split()) <= 22 or not _SUBJECT.match(sentence):
            continue
        found = list(_PREDICATE.finditer(sentence))
        if len(found) != 1 or re.search(r"\b(?:not|no|never|if|or|when|but|than)\b|n't|\?", sentence):
            continue  # with two predicates, a condition or a negation the substitute need not contradict
        at = found[0]
        word = at["word"]
        anti = opposite.get(word)
        if anti is None or split_of(min(word, anti)) != split or _more_than_one(sentence[: at.start()]):
            continue
        if word.endswith("ing") or (word.endswith("ed") and anti == f"un{word}"):
            continue  # a verb's form: nobody says that a history was unpublished in 1994
        yield Cluster(sentence, tuple(_items(rng, sentence, at, word, anti)), "wordnet")


def _more_than_one(subject: str) -> bool:
    """Whether the subject may be several clauses or things, so that the predicate is of one of them only."""
    return bool(re.search(r"[,;]| (?:and|who|that|which|as|because) ", subject)) or len(subject.split()) > 8


def _items(rng: random.Random, sentence: str, at: "re.Match[str]", word: str, anti: str) -> Iterator[Item]:
    before, after = sentence[: at.start("be")], sentence[at.end("word") :]
    be, how = at["be"], at["how"] or ""

    def told(what: str, start: str = before) -> str:
        return f"{start}{be} {what}{after}"

    subject = before.strip()
    inner = subject[0].lower() + subject[1:]
    yield Item(told(f"{how if how != 'very ' else ''}{anti}"), CONTRADICTION, "antonym")
    yield Item(told(f"not {word}"), CONTRADICTION, "negation")
    if rng.random() < 0.5:
        yield Item(f"It is not true that {inner} {be} {word}{after}", CONTRADICTION, "negation")
    yield Item(told(f"not {anti}"), ENTAILMENT, "double-negation")
    if rng.random() < 0.5:
        yield Item(f"It is not the case that {inner} {be} {anti}{after}", ENTAILMENT, "double-negation")
    yield Item(
        told(anti, f"{rng.choice(_OTHERS)} ") if be in ("is", "was") else f"The others {be} {anti}{after}",
        NEUTRAL,
        "entity",
    )
    yield Item(
        rng.choice(
            [
                f"{be.capitalize()} {inner} {anti}{after.rstrip('.')}?",
                f"Somebody claimed that {inner} {be} {anti}{after}",
                f"Last year {inner} {'was' if be in ('is', 'was') else 'were'} {anti}{after}"
                if be in ("is", "are")
                else f"Years later {inner} {be} {anti}{after}",
            ]
        ),
        NEUTRAL,
        "reported",
    )
