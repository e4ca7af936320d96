"""What the kernel compares besides vectors and texts: records of states."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from kimera_stream.core.index.values import ValueCodes, hash64
from kimera_stream.infrastructure.caching import KeptResults
from kimera_stream.kernels import Record, build_record
from kimera_stream.protocol.objects import RESERVED_SYMBOLS, Scalar

_FROM, _TO = -(1 << 63), (1 << 63) - 1


_KEPT_CHARS = 64
"""Length of a key whose hash is remembered."""


def _key_hash(key: str) -> int:
    return _kept_hash(key) if len(key) <= _KEPT_CHARS else hash64(key)


@lru_cache(maxsize=16_384)
def _kept_hash(key: str) -> int:
    return hash64(key)


KEY_HASHES: Final = KeptResults(_kept_hash, each=500)
"""What is remembered of keys."""


def _limit(value: Scalar, default: int, rounded: Callable[[float], int]) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return max(_FROM, min(_TO, rounded(value)))


def _window(state: Mapping[str, Scalar]) -> tuple[int, int] | None:
    if "valid_from" not in state and "valid_to" not in state:
        return None
    return _limit(state.get("valid_from"), _FROM, math.floor), _limit(state.get("valid_to"), _TO, math.ceil)


def _facts(state: Mapping[str, Scalar], code: Callable[[Scalar], int]) -> Iterator[tuple[int, int]]:
    for key, value in state.items():
        if key not in RESERVED_SYMBOLS:
            yield _key_hash(key), code(value)


def build_state_record(state: Mapping[str, Scalar], layers: Iterable[str], codes: ValueCodes, *, store: bool) -> Record:
    """The record of a geoid's symbolic state and of the keys of its semantic one.

    ``store`` holds its interned values in ``codes`` (``drop_record`` lets go of them); otherwise they are only looked up.
    A ``subject`` or ``as_of`` of null counts as not given.
    """
    code = codes.hold if store else codes.look
    facts = list(_facts(state, code))
    subject, moment = state.get("subject"), state.get("as_of")
    return build_record(
        facts,
        subject=code(subject) if facts and subject is not None else 0,
        moment=code(moment) if facts and moment is not None else 0,
        window=_window(state) if facts else None,
        layers=[_key_hash(key) for key in layers],
    )
