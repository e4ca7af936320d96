"""Is what a client says of a geoid acceptable? Every refusal names the field and what was expected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kimera_stream.infrastructure.settings import ApiSettings
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import BadRequestError, LimitExceededError, TooLargeError
from kimera_stream.protocol.objects import GeoidBody, Scalar

MAX_KEY_CHARS = 256
MAX_VALUE_CHARS = 4096
MAX_PURPOSE_CHARS = 1024
MAX_IDEMPOTENCY_KEY_CHARS = 255
MAX_REASON_CHARS = 2_000
MAX_METADATA_DEPTH = 16
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
WEIGHT_MAX = 1e12
"""Far above any sensible weight, far below where a sum of 256 of them loses precision that matters."""

_TIMES = ("valid_from", "valid_to")


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """The limits of section 6 of the contract that concern one geoid."""

    text_chars: int
    state_keys: int
    metadata_bytes: int
    dimension: int

    @classmethod
    def from_settings(cls, api: ApiSettings, dimension: int) -> "BodyLimits":
        return cls(api.max_text_chars, api.max_state_keys, api.max_metadata_bytes, dimension)


def validate_body(body: GeoidBody, limits: BodyLimits, *, merge: bool = False, where: str = "geoid") -> None:
    """Check a body.

    Args:
        body: As decoded.
        limits: What is allowed.
        merge: A PATCH: the body may leave out every statement, but has to change something.
        where: Path of the body in the request, for messages.

    Raises:
        BadRequestError: wrong content.
        TooLargeError: text or metadata beyond its size.
        LimitExceededError: too many keys, or nested too deeply.
    """
    for name in ("id", "session_id", "originator_agent_id"):
        if (value := getattr(body, name)) is not None:
            check_id(value, f"{where}.{name}")
    if body.id in (".", ".."):  # a path of them means another one: no client could ask for it over HTTP
        raise BadRequestError(f"{where}.id: expected 1-128 URL-safe characters, not only . or ..", field=f"{where}.id")
    if body.text is not None:
        _check_text(body.text, limits.text_chars, f"{where}.text")
    if body.purpose is not None:
        _check_string(body.purpose, MAX_PURPOSE_CHARS, f"{where}.purpose")
    if body.vector is not None:
        check_vector(body.vector, limits.dimension, f"{where}.vector")
    if body.semantic_state is not None:
        _check_semantic(body.semantic_state, limits.state_keys, f"{where}.semantic_state")
    if body.symbolic_state is not None:
        _check_symbolic(body.symbolic_state, limits.state_keys, f"{where}.symbolic_state")
    if body.metadata is not None:
        _check_metadata(body.metadata, limits.metadata_bytes, f"{where}.metadata")
    if merge:
        return
    if body.text is None and body.vector is None and not body.semantic_state and not body.symbolic_state:
        raise BadRequestError(
            f"{where}: expected at least one of text, vector, semantic_state, symbolic_state", field=where
        )


def check_text(text: str, max_chars: int, field: str) -> None:
    """Check a text that is not part of a geoid (a search, a watch); as ``validate_body`` would."""
    _check_text(text, max_chars, field)


def check_key(key: str) -> None:
    """Check an idempotency key.

    Raises:
        BadRequestError: empty, too long, or not to be stored.
    """
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise BadRequestError(f"key: expected 1-{MAX_IDEMPOTENCY_KEY_CHARS} characters", field="key")
    check_encodable(key, "key")


def check_reason(reason: str) -> None:
    """Check why somebody resolves a contradiction.

    Raises:
        BadRequestError: too long, or not to be stored.
    """
    if len(reason) > MAX_REASON_CHARS:
        raise BadRequestError(f"reason: expected at most {MAX_REASON_CHARS} characters", field="reason")
    check_encodable(reason, "reason")


def check_vector(vector: list[float], dimension: int, field: str) -> None:
    """Check length, finiteness and that a direction can be made of it.

    Raises:
        BadRequestError: it is not a vector of ``dimension`` finite numbers with a direction.
    """
    if len(vector) != dimension:
        raise BadRequestError(f"{field}: expected {dimension} numbers, got {len(vector)}", field=field)
    largest = 0.0
    for position, value in enumerate(vector):
        if not math.isfinite(value):
            raise BadRequestError(f"{field}[{position}]: expected a finite number, got {value}", field=field)
        largest = max(largest, abs(value))
    if largest < 1e-30 or largest > 1e30:
        raise BadRequestError(
            f"{field}: expected a vector with a direction (largest value between 1e-30 and 1e30)", field=field
        )


def _check_text(text: str, max_chars: int, field: str) -> None:
    if len(text) > max_chars:
        raise TooLargeError(f"{field}: expected at most {max_chars} characters, got {len(text)}", field=field)
    if not text.strip():
        raise BadRequestError(f"{field}: expected some text, got only white space", field=field)
    check_encodable(text, field)


def _check_string(value: str, max_chars: int, field: str) -> None:
    if len(value) > max_chars:
        raise TooLargeError(f"{field}: expected at most {max_chars} characters, got {len(value)}", field=field)
    check_encodable(value, field)


def check_encodable(value: str, field: str) -> None:
    """Check that a text can be stored.

    Raises:
        BadRequestError: NUL characters or lone surrogates.
    """
    if "\0" in value:  # PostgreSQL's text cannot hold it
        raise BadRequestError(f"{field}: expected text without NUL characters", field=field)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f"{field}: expected Unicode text without lone surrogates", field=field) from error


def _check_keys(state: Mapping[str, Any], max_keys: int, field: str) -> None:
    if len(state) > max_keys:
        raise LimitExceededError(f"{field}: expected at most {max_keys} keys, got {len(state)}", field=field)
    for key in state:
        if not key or len(key) > MAX_KEY_CHARS:
            raise BadRequestError(
                f"{field}: expected keys of 1-{MAX_KEY_CHARS} characters, got {len(key)}", field=field
            )
        check_encodable(key, field)


def _check_semantic(state: dict[str, float], max_keys: int, field: str) -> None:
    _check_keys(state, max_keys, field)
    for key, weight in state.items():
        if not (math.isfinite(weight) and 0 <= weight <= WEIGHT_MAX):
            raise BadRequestError(
                f"{field}.{key}: expected a finite weight between 0 and {WEIGHT_MAX:g}, got {weight}",
                field=f"{field}.{key}",
            )
    if state and not any(state.values()):
        raise BadRequestError(f"{field}: expected at least one weight above 0", field=field)


def _check_symbolic(state: dict[str, Scalar], max_keys: int, field: str) -> None:
    _check_keys(state, max_keys, field)
    for key, value in state.items():
        _check_scalar(value, f"{field}.{key}")
    for key in _TIMES:
        value = state.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadRequestError(f"{field}.{key}: expected unix milliseconds (a number)", field=f"{field}.{key}")
    start, end = state.get("valid_from"), state.get("valid_to")
    if isinstance(start, int | float) and isinstance(end, int | float) and start > end:
        raise BadRequestError(f"{field}.valid_to: expected a time at or after valid_from", field=f"{field}.valid_to")


def _check_scalar(value: object, field: str) -> None:
    if isinstance(value, str):
        _check_string(value, MAX_VALUE_CHARS, field)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadRequestError(f"{field}: expected a finite number, got {value}", field=field)
    elif isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise BadRequestError(f"{field}: expected an integer of at most 64 bits", field=field)
    elif value is not None:
        raise BadRequestError(f"{field}: expected text, a number, true, false or null", field=field)


def _check_metadata(metadata: dict[str, Any], max_bytes: int, field: str) -> None:
    _check_json(metadata, field, MAX_METADATA_DEPTH)
    size = len(msgspec.json.encode(metadata))
    if size > max_bytes:
        raise TooLargeError(f"{field}: expected at most {max_bytes} bytes as JSON, got {size}", field=field)


def _check_json(value: object, field: str, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == 0:
            raise LimitExceededError(f"{field}: expected at most {MAX_METADATA_DEPTH} levels of nesting", field=field)
        if isinstance(value, list):
            for item in value:
                _check_json(item, field, depth - 1)
            return
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadRequestError(f"{field}: expected text keys only", field=field)
            check_encodable(key, field)
            _check_json(item, field, depth - 1)
    elif isinstance(value, str):
        check_encodable(value, field)
    elif value is None or isinstance(value, int | float):
        _check_scalar(value, field)
    else:  # MessagePack can carry bytes, timestamps and extensions, JSON cannot
        raise BadRequestError(f"{field}: expected JSON values only, got {type(value).__name__}", field=field)


def validate_query(text: str | None, vector: list[float] | None, limits: BodyLimits, *, where: str) -> None:
    """Check what is asked about: a text or a vector, not both.

    Raises:
        BadRequestError, TooLargeError: names the field and what was expected.
    """
    check_one_of(text, vector)
    validate_body(GeoidBody(text=text, vector=vector), limits, where=where)


def check_one_of(text: str | None, vector: list[float] | None) -> None:
    """Refuse a question that has both a text and a vector, or neither.

    Raises:
        BadRequestError: names the text.
    """
    if (text is None) == (vector is None):
        raise BadRequestError("text: expected either text or vector", field="text")
