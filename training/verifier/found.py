"""``python -m training.verifier.found SOURCES TARGET``: the further public sets of ``--found``, made from local copies of their sources.

``SOURCES`` holds the repositories that docs/model_card.md names, each as ``owner/name``; nothing is downloaded here. Each set becomes
``TARGET/NAME.jsonl.gz`` of ``{"premise", "hypothesis", "label"}``. Pairs of the sets that are for measuring only, and pairs that share a
premise with one, are left out; so are duplicates and pairs without a known label.
"""

import ast
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from training.verifier.public import MEASURING, read_public

Pair = tuple[str, str, str]
"""Premise, hypothesis, and the label as the source has it."""
LABELS = {
    "contradiction": "contradiction",
    "entailment": "entailment",
    "neutral": "neutral",
    "non-entailment": "neutral",  # HANS: what does not follow does not contradict there either
    "SUPPORTS": "entailment",
    "REFUTES": "contradiction",
    "1": "entailment",  # FEVER as numbered by the repository; 0 is "not enough info", without evidence
    "2": "contradiction",
}

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True, slots=True)
class Found:
    """One set. ``files``: paths in SOURCES, all needed; ``read``: from the text of one of them to its pairs."""

    files: tuple[str, ...]
    read: Callable[[str], Iterable[Pair]]


def _rows(text: str, delimiter: str) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(text), delimiter=delimiter)


def _plain_rows(text: str) -> Iterator[dict[str, str]]:
    """Tab-separated lines in which a quotation mark is only that."""
    return csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def asserted(text: str) -> Iterator[Pair]:
    """MultiNLI as ``label,text,assertion``."""
    return ((row["text"], row["assertion"], row["label"]) for row in _rows(text, ","))


_ASKED = re.compile(
    r'For the statement, "(?P<premise>.*)", does the hypothesis "(?P<hypothesis>.*)" represent entailment,', re.DOTALL
)


def asked(text: str) -> Iterator[Pair]:
    """MultiNLI as questions, ``Question,Answer,Origin``."""
    for row in _rows(text, ","):
        if found := _ASKED.match(row["Question"]):
            yield found["premise"], found["hypothesis"].strip('"'), row["Answer"]


def tokenized(text: str) -> Iterator[Pair]:
    """MultiNLI in tokens, ``sentence1 sentence2 label genre`` with tabs."""
    return ((joined(row["sentence1"]), joined(row["sentence2"]), row["label"]) for row in _plain_rows(text))


def objects(text: str) -> Iterator[Pair]:
    """JSON lines with ``premise``, ``hypothesis`` and ``label`` (WANLI with marked spans)."""
    return ((row["premise"], row["hypothesis"], row["label"]) for row in _objects(text))


def evidence(text: str) -> Iterator[Pair]:
    """FEVER, ``id,verifiable,label,claim,evidence``: claims with one sentence of evidence, which says all there is to it."""
    for row in _rows(text, ","):
        sentences = ast.literal_eval(row["evidence"])
        if len(sentences) == 1:
            yield joined(sentences[0]), row["claim"], row["label"]


def numbered(text: str) -> Iterator[Pair]:
    """SNLI without a head, ``label label premise hypothesis`` with tabs; 1 neutral, 2 contradiction, 3 entailment."""
    names = {"1": "neutral", "2": "contradiction", "3": "entailment"}
    for row in csv.reader(io.StringIO(text), delimiter="\t"):
        if len(row) == 4:
            yield row[2].strip('"'), row[3], names.get(row[0], "")


def negated(text: str) -> Iterator[Pair]:
    """Negated MultiNLI and SNLI, ``index Text Hypothesis gold_label`` with tabs."""
    return ((row["Text"], row["Hypothesis"], row["gold_label"]) for row in _plain_rows(text))


def ambiguous(text: str) -> Iterator[Pair]:
    """AmbiEnt: pairs with one label as they are, ambiguous ones in each of the readings that were written out."""
    for row in _objects(text):
        if "," not in row["labels"]:
            yield row["premise"], row["hypothesis"], row["labels"]
        else:
            yield from ((each["premise"], each["hypothesis"], each["label"]) for each in row["disambiguations"])


def fooled(text: str) -> Iterator[Pair]:
    """Fool Me Twice: claims with one sentence of gold evidence."""
    for row in _objects(text):
        if len(row["gold_evidence"]) == 1:
            yield row["gold_evidence"][0]["text"], row["text"], row["label"]


def sentences(text: str) -> Iterator[Pair]:
    """MED and HANS, in the columns of MultiNLI's release."""
    return ((row["sentence1"], row["sentence2"], row["gold_label"]) for row in _plain_rows(text))


def scoped(text: str) -> Iterator[Pair]:
    """ScoNe: the edited sentences, or, in the file of one scoped negation, those that the others were edited from."""
    for row in _rows(text, ","):
        end = "_edited" if "sentence1_edited" in row else ""
        yield row[f"sentence1{end}"], row[f"sentence2{end}"], row[f"gold_label{end}"]


_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "``": '"', "''": '"'}


def joined(text: str) -> str:
    """Tokens as people write them: "It 's ( not ) so ." becomes "It's (not) so."."""
    for token, sign in _BRACKETS.items():
        text = text.replace(token, sign)
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", text)
    text = re.sub(r'" ([^"]*?) ?"', r'"\1"', text)
    return re.sub(r"([(\[$]) ", r"\1", re.sub(r" ([.,;:!?%)\]])", r"\1", text)).strip()


MNLI = "mlengineershub/MNLI-MultiModel-Benchmark/data"
SCONE = ("no_negation", "one_not_scoped", "one_scoped", "one_scoped_one_not_scoped", "two_not_scoped", "two_scoped")
SETS: dict[str, tuple[Found, ...]] = {
    "mnli_a": (Found((f"{MNLI}/dev1.csv", f"{MNLI}/dev2.csv"), asserted),),
    "mnli_b": (
        Found(("technion-cs-nlp/LLMsKnow/data/mnli_train.csv",), asked),
        Found(("tp823/HW2-NLP/mnli_train.tsv",), tokenized),
    ),
    "wanli": (
        Found(
            tuple(
                f"eric11eca/disco/data/input/wanli/{label}_spans.jsonl"
                for label in ("contradiction", "entailment", "neutral")
            ),
            objects,
        ),
    ),
    # Both files were cut from FEVER's training part by the repository; its own training file is the rest of that.
    "fever_train_part": (
        Found(
            tuple(f"GGKorn/fever-nli/data/vanilla_wiki_data/{part}_data_vanilla.csv" for part in ("eval", "test")),
            evidence,
        ),
    ),
    "snli_a": (Found(("academic-repository/cat/data/snli/train.csv",), numbered),),
    "negation_nli": (
        Found(
            tuple(
                f"mosharafhossain/negation-and-nli/data/new_benchmarks/clean_data/{name}.txt"
                for name in ("MNLI", "SNLI")
            ),
            negated,
        ),
    ),
    "ambient": (Found(tuple(f"alisawuffles/ambient/AmbiEnt/{part}.jsonl" for part in ("dev", "test")), ambiguous),),
    "fool_me_twice": (Found(("google-research/fool-me-twice/dataset/dev.jsonl",), fooled),),
    "med": (Found(("verypluming/MED/MED.tsv",), sentences),),
    "scone": (Found(tuple(f"selenashe/ScoNe/scone_nli/train/{name}.csv" for name in SCONE), scoped),),
    "hans": (Found(("tommccoy1/hans/heuristics_train_set.txt",), sentences),),
}


def plain(text: str) -> str:
    """What stays of ``text`` whatever its capitals, marks and tokens: to find it again in another edition."""
    return re.sub(r"[^a-z0-9]", "", text.casefold())


def held_back(data: Path) -> set[str]:
    """The premises of the sets for measuring in ``data``, as ``plain`` text.

    Raises:
        FileNotFoundError: one of them is not there, so that nobody knows what must be left out.
    """
    return {plain(example.first) for name in MEASURING for example in read_public(data, name)}


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("cp1252")  # negated pairs that went through an office program
    return text.replace("\r\n", "\n")


def prepare(name: str, sources: Path, target: Path, held: set[str]) -> int:
    """Write ``target/NAME.jsonl.gz``; returns its pairs.

    Raises:
        FileNotFoundError: a file of the set is not in ``sources``.
        ValueError: no pair was found in a file; its format is another than the one known here.
    """
    seen: dict[tuple[str, str], None] = {}
    lines: list[str] = []
    for found in SETS[name]:
        for path in found.files:
            read = 0
            for premise, hypothesis, label in found.read(_text_of(sources / path)):
                key = plain(premise), plain(hypothesis)
                if label not in LABELS or not all(key):
                    continue
                read += 1
                if key in seen or held.intersection(key):
                    continue
                seen[key] = None
                row = {"premise": premise.strip(), "hypothesis": hypothesis.strip(), "label": LABELS[label]}
                lines.append(json.dumps(row, ensure_ascii=False))
            if not read:
                raise ValueError(f"{path}: no pair found in it")
    target.mkdir(parents=True, exist_ok=True)
    # Without a time in its head the file depends on nothing but the pairs.
    (target / f"{name}.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    return len(lines)


@app.command()
def main(
    sources: Annotated[Path, typer.Argument(help="Directory of the repositories' copies, each as owner/name.")],
    target: Annotated[Path, typer.Argument(help="Directory to write, for --found.")],
    data: Annotated[Path, typer.Option(help="Directory of the public pairs, with the sets for measuring.")] = Path(
        "../shared/data"
    ),
) -> None:
    """Make every set whose files are there; say which are not."""
    held = held_back(data)
    for name in SETS:
        try:
            print(f"{name}: {prepare(name, sources, target, held)} pairs")
        except FileNotFoundError as missing:
            print(f"{name}: left out, there is no {missing.filename}")


if __name__ == "__main__":
    app()
