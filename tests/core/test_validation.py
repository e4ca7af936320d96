"""Every refusal names the field and what was expected; everything else passes."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.core.validation import BodyLimits, check_vector, validate_body
from kimera_stream.protocol.errors import BadRequestError, LimitExceededError, OperationalError, TooLargeError
from kimera_stream.protocol.objects import GeoidBody

LIMITS = BodyLimits(text_chars=100, state_keys=4, metadata_bytes=1024, dimension=3)


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"in": value}
    return value


@pytest.mark.parametrize(
    ("body", "error", "field"),
    [
        ({}, BadRequestError, "geoid"),
        ({"metadata": {"a": 1}}, BadRequestError, "geoid"),
        ({"semantic_state": {}, "symbolic_state": {}}, BadRequestError, "geoid"),
        ({"text": " \n"}, BadRequestError, "geoid.text"),
        ({"text": "x" * 101}, TooLargeError, "geoid.text"),
        ({"text": "a\0b"}, BadRequestError, "geoid.text"),
        ({"text": "a\ud800b"}, BadRequestError, "geoid.text"),
        ({"text": "a", "id": "no spaces"}, BadRequestError, "geoid.id"),
        ({"text": "a", "id": ""}, BadRequestError, "geoid.id"),
        ({"text": "a", "id": "."}, BadRequestError, "geoid.id"),
        ({"text": "a", "id": ".."}, BadRequestError, "geoid.id"),
        ({"text": "a", "session_id": "x" * 129}, BadRequestError, "geoid.session_id"),
        ({"text": "a", "originator_agent_id": "a/b"}, BadRequestError, "geoid.originator_agent_id"),
        ({"vector": [1.0, 2.0]}, BadRequestError, "geoid.vector"),
        ({"vector": [1.0, math.nan, 0.0]}, BadRequestError, "geoid.vector"),
        ({"vector": [1.0, math.inf, 0.0]}, BadRequestError, "geoid.vector"),
        ({"vector": [0.0, 0.0, 0.0]}, BadRequestError, "geoid.vector"),
        ({"semantic_state": {"a": math.nan}}, BadRequestError, "geoid.semantic_state.a"),
        ({"semantic_state": {"a": -0.1}}, BadRequestError, "geoid.semantic_state.a"),
        ({"semantic_state": {"a": 0.0}}, BadRequestError, "geoid.semantic_state"),
        ({"semantic_state": dict.fromkeys("abcde", 1.0)}, LimitExceededError, "geoid.semantic_state"),
        ({"symbolic_state": dict.fromkeys("abcde", 1)}, LimitExceededError, "geoid.symbolic_state"),
        ({"symbolic_state": {"": 1}}, BadRequestError, "geoid.symbolic_state"),
        ({"symbolic_state": {"a": math.inf}}, BadRequestError, "geoid.symbolic_state.a"),
        ({"symbolic_state": {"a": 2**63}}, BadRequestError, "geoid.symbolic_state.a"),
        ({"symbolic_state": {"a": "b\0"}}, BadRequestError, "geoid.symbolic_state.a"),
        ({"symbolic_state": {"valid_from": "noon"}}, BadRequestError, "geoid.symbolic_state.valid_from"),
        ({"symbolic_state": {"valid_from": 2, "valid_to": 1}}, BadRequestError, "geoid.symbolic_state.valid_to"),
        ({"text": "a", "metadata": {"a": "x" * 2000}}, TooLargeError, "geoid.metadata"),
        ({"text": "a", "metadata": nested(20)}, LimitExceededError, "geoid.metadata"),
        ({"text": "a", "metadata": {"a": math.nan}}, BadRequestError, "geoid.metadata"),
        ({"text": "a", "metadata": {"a": b"bytes"}}, BadRequestError, "geoid.metadata"),
    ],
)
def test_what_is_refused(body: dict[str, Any], error: type[OperationalError], field: str) -> None:
    with pytest.raises(error) as caught:
        validate_body(GeoidBody(**body), LIMITS)
    assert caught.value.field == field
    assert caught.value.message.startswith(field)
    assert "expected" in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        {"text": "ü" * 100},
        {"vector": [0.0, -1e-3, 0.0]},
        {"semantic_state": {"a": 3.0, "b": 0.0}},
        {"symbolic_state": {"a": None, "b": True, "c": -(2**63), "subject": "x"}},
        {"text": "a", "metadata": nested(15), "id": "A-z_0.~"},
        {"text": "a", "id": "...", "session_id": ".."},
    ],
)
def test_what_is_accepted(body: dict[str, Any]) -> None:
    validate_body(GeoidBody(**body), LIMITS)


def test_a_patch_may_leave_every_statement_out_but_is_checked_otherwise() -> None:
    validate_body(GeoidBody(metadata={"seen": True}), LIMITS, merge=True)
    with pytest.raises(TooLargeError):
        validate_body(GeoidBody(text="x" * 101), LIMITS, merge=True)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3))
def test_a_vector_passes_exactly_if_it_is_finite_and_has_a_direction(vector: list[float]) -> None:
    largest = max((abs(value) for value in vector), default=0.0)
    fine = all(math.isfinite(value) for value in vector) and 1e-30 <= largest <= 1e30
    if fine:
        check_vector(vector, 3, "vector")
    else:
        with pytest.raises(BadRequestError, match="vector"):
            check_vector(vector, 3, "vector")
