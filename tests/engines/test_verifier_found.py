"""The further public sets from their sources' formats. The lines are made up; only their form is that of the sources."""

import gzip
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))  # training is not installed with the package

from training.verifier import found
from training.verifier.found import Pair
from training.verifier.public import FOUND, MEASURING, found_examples

C, E, N = "contradiction", "entailment", "neutral"

FORMATS: list[tuple[Callable[[str], Iterable[Pair]], str, list[Pair]]] = [
    (
        found.asserted,
        'label,text,assertion\nneutral,The pier is long.,"It is long, and new."\ncontradiction,"He said, ""no"".",Yes.\n',
        [("The pier is long.", "It is long, and new.", N), ('He said, "no".', "Yes.", C)],
    ),
    (
        found.asked,
        'Question,Answer,Origin\n"For the statement, ""The pier, ""old"" as it is, stands"", does the hypothesis ""The pier fell"" '
        'represent entailment, contradiction, or neutrality?",contradiction,mnli\n"Something else?",neutral,mnli\n',
        [('The pier, "old" as it is, stands', "The pier fell", C)],
    ),
    (
        found.tokenized,
        "sentence1\tsentence2\tlabel\tgenre\nIt 's \" long \" , is n't it ?\tIt does n't end ( yet ) .\tneutral\ttravel\n",
        [("It's \"long\", isn't it?", "It doesn't end (yet).", N)],
    ),
    (
        found.objects,
        '{"id": 4, "premise": "Rates are 4.9%.", "hypothesis": "Rates are unknown.", "label": "contradiction", "all_spans_p": []}\n',
        [("Rates are 4.9%.", "Rates are unknown.", C)],
    ),
    (
        found.evidence,
        "id,verifiable,label,claim,evidence\n"
        "7,1,2,The film is silent.,\"['The film -LRB- 1984 -RRB- has a score .']\"\n"
        '8,1,1,The film has sound.,"[""The film \'s score won a prize .""]"\n'
        "9,1,1,The film is old.,\"['One .', 'Two .']\"\n"
        "10,0,0,The film is good.,[]\n",
        [
            ("The film (1984) has a score.", "The film is silent.", "2"),
            ("The film's score won a prize.", "The film has sound.", "1"),
        ],
    ),
    (
        found.numbered,
        "1\t1\tA man waits.\tHe waits for a bus.\n2\t2\tA man waits.\tHe runs.\n3\t3\t"
        '"A sign reads ""stop""."\tThere is a sign.\nbroken line\n',
        [
            ("A man waits.", "He waits for a bus.", N),
            ("A man waits.", "He runs.", C),
            ('A sign reads "stop".', "There is a sign.", E),
        ],
    ),
    (
        found.negated,
        'index\tText\tHypothesis\tgold_label\n0\tHe did not "wait".\tHe waited.\tcontradiction\n',
        [('He did not "wait".', "He waited.", C)],
    ),
    (
        found.ambiguous,
        '{"premise": "a", "hypothesis": "b", "labels": "entailment", "disambiguations": []}\n'
        '{"premise": "c", "hypothesis": "d", "labels": "entailment, neutral", "disambiguations": '
        '[{"premise": "c1", "hypothesis": "d", "label": "neutral"}, {"premise": "c2", "hypothesis": "d", "label": "entailment"}]}\n',
        [("a", "b", E), ("c1", "d", N), ("c2", "d", E)],
    ),
    (
        found.fooled,
        '{"text": "He won.", "label": "REFUTES", "gold_evidence": [{"section_header": "Life", "text": "He lost."}]}\n'
        '{"text": "He won.", "label": "SUPPORTS", "gold_evidence": [{"text": "One."}, {"text": "Two."}]}\n',
        [("He lost.", "He won.", "REFUTES")],
    ),
    (
        found.sentences,
        'gold_label\tsentence1_parse\tsentence1\tsentence2\tpairID\nnon-entailment\t(ROOT)\tThe "judge" saw the clerk .\tThe clerk saw .\tex1\n',
        [('The "judge" saw the clerk .', "The clerk saw .", "non-entailment")],
    ),
    (
        found.scoped,
        ",sentence1,sentence2,gold_label,sentence1_edited,sentence2_edited,gold_label_edited\n"
        "0,No hat.,No cap.,entailment,A hat.,A cap.,neutral\n",
        [("A hat.", "A cap.", N)],
    ),
    (found.scoped, ",sentence1,sentence2,gold_label\n0,No hat.,No cap.,entailment\n", [("No hat.", "No cap.", E)]),
]


@pytest.mark.parametrize(("read", "text", "pairs"), FORMATS)
def test_a_format_gives_its_pairs(read: Callable[[str], Iterable[Pair]], text: str, pairs: list[Pair]) -> None:
    assert list(read(text)) == pairs


def test_every_further_set_has_a_way_to_be_made() -> None:
    assert set(found.SETS) == set(FOUND)
    assert {each.read for parts in found.SETS.values() for each in parts} == {read for read, _, _ in FORMATS}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The sets for measuring: one premise each."""
    for name in MEASURING:
        row = {"premise": f"A held premise of {name}, isn't it?", "hypothesis": "x", "label": "neutral"}
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    return tmp_path


def put(sources: Path, path: str, text: str) -> None:
    (sources / path).parent.mkdir(parents=True, exist_ok=True)
    (sources / path).write_text(text, encoding="utf-8")


def test_what_measures_is_left_out_whatever_its_tokens(data: Path, tmp_path: Path) -> None:
    name = MEASURING[0]
    path = found.SETS["snli_a"][0].files[0]
    put(
        tmp_path / "sources",
        path,
        f"1\t1\ta held premise of {name} , is n't it ?\tIt is.\n"
        f"1\t1\tIt is.\tA held premise of {name}, isn't it?\n"
        "3\t3\tA man  waits.\tHe waits.\n3\t3\tA man waits\tHe waits\n2\t2\tA man waits.\tHe runs.\n-\t-\tA man waits.\tWho?\n",
    )
    assert found.prepare("snli_a", tmp_path / "sources", tmp_path / "new", found.held_back(data)) == 2
    written = (tmp_path / "new" / "snli_a.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(written).splitlines()]
    assert rows == [
        {"premise": "A man  waits.", "hypothesis": "He waits.", "label": E},
        {"premise": "A man waits.", "hypothesis": "He runs.", "label": C},
    ]
    assert written[4:8] == bytes(4)  # no time: made again, the file is the same


def test_a_file_in_an_older_encoding_is_read_too(tmp_path: Path) -> None:
    text = "index\tText\tHypothesis\tgold_label\r\n0\tHe said \u201cno\u201d.\tHe did not say yes.\tentailment\r\n"
    for path in found.SETS["negation_nli"][0].files:
        put(tmp_path, path, "")
        (tmp_path / path).write_bytes(text.encode("cp1252"))
    assert found.prepare("negation_nli", tmp_path, tmp_path / "new", set()) == 1
    row = json.loads(gzip.decompress((tmp_path / "new" / "negation_nli.jsonl.gz").read_bytes()))
    assert row == {"premise": "He said \u201cno\u201d.", "hypothesis": "He did not say yes.", "label": E}


def test_a_file_of_another_format_is_refused(data: Path, tmp_path: Path) -> None:
    put(tmp_path, found.SETS["snli_a"][0].files[0], "premise,hypothesis\na,b\n")
    with pytest.raises(ValueError, match="no pair found"):
        found.prepare("snli_a", tmp_path, tmp_path / "new", set())
    (data / f"{MEASURING[0]}.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError):
        found.held_back(data)


def test_the_command_makes_what_is_there_and_training_reads_it(data: Path, tmp_path: Path) -> None:
    texts = {read: text for read, text, _ in FORMATS}
    for name, parts in found.SETS.items():
        for part in parts:
            for path in part.files:
                if name != "hans":
                    put(tmp_path / "sources", path, texts[part.read])
    arguments = [str(tmp_path / "sources"), str(tmp_path / "new"), "--data", str(data)]
    result = CliRunner().invoke(found.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "mnli_b: 2 pairs" in result.output
    assert "hans: left out, there is no" in result.output
    assert {path.name.split(".")[0] for path in (tmp_path / "new").iterdir()} == set(FOUND) - {"hans"}
    assert len(found_examples(tmp_path / "new", 1)) > 5
