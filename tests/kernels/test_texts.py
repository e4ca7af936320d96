"""Signatures of texts: the compiled ones against their definition."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kimera_stream import kernels
from kimera_stream.kernels import NAMED_MASK, NEGATED_BIT, NUMBERS_MASK, TEXT_BIT
from kimera_stream.kernels.texts import (
    _AMOUNTS,
    _NEGATIONS,
    _NUMBER_WORDS,
    OVERLAP_CHARS,
    reference_overlaps,
    reference_signature,
)

WORDS = sorted(
    {
        *_NEGATIONS,
        *_NUMBER_WORDS,
        *_AMOUNTS,
        "W7-77",
        "db1.",
        "#48213",
        "Order",
        "(x2)",
        "5kg",
        "customers",
        "one",
        "notable",
        "nine's",
        "don't",
        "CAN'T",
        "it't",
        "isn't5",
        "n't",
        "seventeens",
    }
)
NUMBERS = ["0", "7", "1,234", "1,,2", "3.25", "0.1", "1e5", "00012", "12.", ".5", "999999999999999", "1000000000000000",
           "123456789.123456", "0.0000000000000001", "1.000000000000000", "9" * 400, "2.50", "2.5"]  # fmt: skip
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from(NUMBERS),
        st.sampled_from(
            [" ", ", ", "_", "'", "'t", "t", "-", ".", ",", "\0", "’t", "é", "٣", "İ", "\ud800", "\x1c", "\n"]
        ),
        st.text(max_size=4),
        st.floats(0, 1e9).map(str),
        st.integers(0, 10**17).map(str),
    ),
    max_size=12,
)


@settings(max_examples=600, deadline=None)
@given(TEXTS, st.sampled_from(["", " "]), st.booleans())
@example(["don't"], "", True)
@example([str(number) for number in range(40)], " ", False)
def test_the_compiled_signature_is_the_defined_one(parts: list[str], between: str, upper: bool) -> None:
    text = between.join(parts)
    text = text.upper() if upper else text
    assert kernels.text_signature(text) == reference_signature(text)


def test_many_at_once_are_each_of_them() -> None:
    texts = [None, "", "no", "It’s not 5", "seven and 7", " ".join(map(str, range(50)))]
    signatures = kernels.text_signatures(texts)
    assert signatures.dtype == np.uint32
    assert signatures.tolist() == [reference_signature(text) for text in texts]
    assert signatures[:2].tolist() == [0, 0]


def test_what_a_signature_tells_apart() -> None:
    def of(text: str) -> int:
        return kernels.text_signature(text)

    assert of("the door is open") == TEXT_BIT
    assert of("the door isn't open") == of("the door is NOT open") == TEXT_BIT | NEGATED_BIT
    assert of("it is not never") == TEXT_BIT
    assert of("7 of 12") == of("twelve and seven and 7.0") != of("7 of 13")
    assert of("0") & NUMBERS_MASK == of("zero") & NUMBERS_MASK != 0


def test_what_a_signature_takes_for_a_name() -> None:
    def of(text: str) -> int:
        return kernels.text_signature(text) & NAMED_MASK

    assert of("The valve W7-77 is open.") == of("since 14:05, (w7-77): closed") != of("The valve W8-77 is open.")
    assert (
        of("Order 48213 has been shipped.")
        == of("On 3 May order #48213 came back")
        != of("Order 48214 has been shipped.")
    )
    assert of("Die Größe von Tür 12 stimmt") == of("Tür 12: zu") == of("TÜR 12") != 0
    for amount in (
        "it is 5",
        "at 14:05 on 3",
        "5 of 12",
        "7",
        "3pm",
        "1.5",
        "between 2 and 3",
        "no digit at all",
        "seven men",
    ):
        assert of(amount) == 0


@pytest.mark.parametrize("text", [5, b"bytes", 1.5])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises((TypeError, AttributeError)):
        kernels.text_signatures([text])  # type: ignore[list-item]


STATEMENTS = st.lists(
    st.one_of(
        st.sampled_from(["the", "The", "valve", "valves", "VALVES", "V12", "v12", "bus", "gas", "s", "is", "ourselves", "don't"]),
        st.sampled_from(["Ärger", "ärger", "ÑANDÚS", "ñandú", "Σ", "σ", "ЖУК", "жук", "東京", "東", "a東b", "😀", "\ud800", "×", "\0"]),
        st.text(max_size=4),
        st.integers(0, 300).map(str),
    ),
    max_size=12,
).map(" ".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(STATEMENTS, st.lists(STATEMENTS, max_size=5))
@example("", ["", "a word"])
@example("the", ["the"])
def test_the_compiled_overlap_is_the_defined_one(text: str, others: list[str]) -> None:
    found = kernels.text_overlaps(text, others)
    assert found.dtype == np.float32
    assert found.tolist() == reference_overlaps(text, others).tolist()


@pytest.mark.parametrize(
    "text",
    [
        " ".join(map(str, range(1500))),
        "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
        "x" * 3000,
        "ab " * 667 + "valves",
    ],
)
def test_of_a_long_text_the_same_part_is_read(text: str) -> None:
    others = [text, text[:OVERLAP_CHARS], text[: OVERLAP_CHARS - 1], text[::-1], text[OVERLAP_CHARS:]]
    found = kernels.text_overlaps(text, others)
    assert found.tolist() == reference_overlaps(text, others).tolist()
    assert found[:2].tolist() == [1.0, 1.0]


def test_what_an_overlap_counts() -> None:
    def of(one: str, other: str) -> float:
        return float(kernels.text_overlaps(one, [other])[0])

    assert of("The valves are open.", "An OPEN valve") == 1.0
    assert of("The valve is open.", "The valve is closed.") == 0.5
    assert of("The valve V12 is open.", "The valve V12 is closed.") == 0.75
    assert of("The valve V12 is open.", "The valve V13 is closed.") == 0.25
    assert of("It is not there.", "It is not there.") == 0.0
    assert of("valve", "The valve in the cellar leaks since Monday.") == 1.0
    assert kernels.text_overlaps("valve", []).shape == (0,)


@pytest.mark.parametrize(("text", "others"), [(None, []), ("a", [None]), (b"a", ["a"]), ("a", [5])])
def test_an_overlap_with_what_is_no_text_is_refused(text: object, others: list[object]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        kernels.text_overlaps(text, others)  # type: ignore[arg-type]
