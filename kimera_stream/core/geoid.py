"""The geoid model: how a statement becomes a geoid, how an update changes it, and its entropy."""

import math
import secrets
import time
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import numpy as np

from kimera_stream.core.interfaces import StoredGeoid, Vector
from kimera_stream.protocol.objects import Geoid, GeoidBody

V = TypeVar("V")

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32 in lower case: no letter looks like a digit, and text order is numeric order."""


def new_id(now_ms: int | None = None) -> str:
    """A fresh id: 48 bits of unix milliseconds, then 80 random bits, as 26 URL-safe characters that sort by time."""
    millis = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    number = (millis & ((1 << 48) - 1)) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights`` as a distribution: zero weights left out, the rest summing to 1. Empty stays empty."""
    total = math.fsum(weights.values())
    if total <= 0:
        return {}
    if abs(total - 1) < 1e-9:  # already one: a second division would only change the last digits
        total = 1.0
    return {key: share for key, weight in weights.items() if (share := weight / total) > 0}


def entropy_bits(weights: Mapping[str, float]) -> float:
    """Shannon entropy in bits of ``weights`` taken as a distribution; 0 for an empty one."""
    total = math.fsum(weights.values())
    if total <= 0:
        return 0.0
    shares = (weight / total for weight in weights.values() if weight > 0)
    return max(0.0, -math.fsum(share * math.log2(share) for share in shares if share > 0))


def unit(vector: list[float]) -> Vector:
    """``vector`` scaled to length 1, shape (dim,). The caller has checked that it has a direction."""
    wide = np.asarray(vector, dtype=np.float64)
    wide /= np.abs(wide).max()  # keeps the squares in range
    return np.ascontiguousarray(wide / np.linalg.norm(wide), dtype=np.float32)


def merged(body: GeoidBody, previous: Geoid) -> GeoidBody:
    """A PATCH as the whole statement it results in: what ``body`` leaves out is taken from ``previous``.

    States and metadata are replaced field by field of the geoid, not key by key: a client that wants one key changed
    sends the whole state, and so can also remove keys.
    """

    def keep(new: V | None, old: V | None) -> V | None:
        return old if new is None else new

    return GeoidBody(
        text=keep(body.text, previous.text),
        vector=body.vector,
        semantic_state=keep(body.semantic_state, previous.semantic_state),
        symbolic_state=keep(body.symbolic_state, previous.symbolic_state),
        metadata=keep(body.metadata, previous.metadata),
        id=previous.id,
        session_id=keep(body.session_id, previous.session_id),
        originator_agent_id=keep(body.originator_agent_id, previous.originator_agent_id),
        purpose=keep(body.purpose, previous.purpose),
    )


def built(
    body: GeoidBody,
    *,
    geoid_id: str,
    session_id: str | None,
    now: int,
    offset: int,
    previous: Geoid | None,
) -> Geoid:
    """The geoid that ``body`` states.

    Args:
        body: Validated; for a PATCH already merged.
        geoid_id: Its id.
        session_id: Used where the body names none.
        now: Unix ms.
        offset: Of its log entry.
        previous: The version it replaces, if any.
    """
    semantic = normalised(body.semantic_state or {})
    return Geoid(
        id=geoid_id,
        version=1 if previous is None else previous.version + 1,
        text=body.text,
        semantic_state=semantic,
        symbolic_state=dict(body.symbolic_state or {}),
        metadata=dict(body.metadata or {}),
        session_id=body.session_id if body.session_id is not None else session_id,
        originator_agent_id=body.originator_agent_id,
        purpose=body.purpose,
        entropy=entropy_bits(semantic),
        created_at=now if previous is None else previous.created_at,
        updated_at=now,
        offset=offset,
    )


def same_statement(new: StoredGeoid, old: StoredGeoid) -> bool:
    """Whether an update left everything that contradictions depend on as it was (only metadata and labels differ)."""
    if (new.vector is None) != (old.vector is None):
        return False
    if new.vector is not None and old.vector is not None and not np.array_equal(new.vector, old.vector):
        return False
    return (
        new.geoid.text == old.geoid.text
        and new.geoid.semantic_state == old.geoid.semantic_state
        and msgspec.json.encode(new.geoid.symbolic_state, order="sorted")
        == msgspec.json.encode(old.geoid.symbolic_state, order="sorted")
    )
