"""The components of a pair's score that need no reading of the text."""

import numpy as np

from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.symbolic import SymbolicVerdict
from kimera_stream.protocol.objects import RESERVED_SYMBOLS, Components


def cosine(a: StoredGeoid, b: StoredGeoid) -> float | None:
    """Cosine of the two vectors in [-1, 1]; None where one has no vector."""
    if a.vector is None or b.vector is None:
        return None
    return max(-1.0, min(1.0, float(np.dot(a.vector, b.vector))))


def relatedness(cosine: float | None, verdict: SymbolicVerdict) -> float:
    """How much two geoids are about the same, in [-1, 1].

    The cosine; where one has no vector, the share of symbolic keys they have in common.
    """
    if cosine is not None:
        return cosine
    return verdict.shared / verdict.union if verdict.union else 0.0


def layer_conflict(a: StoredGeoid, b: StoredGeoid) -> float:
    """Jaccard distance of the two key sets, over both layers (semantic and symbolic), in [0, 1]; 0 where neither has keys."""
    keys_a, keys_b = _keys(a), _keys(b)
    union = keys_a | keys_b
    return 1 - len(keys_a & keys_b) / len(union) if union else 0.0


def components(
    a: StoredGeoid, b: StoredGeoid, verdict: SymbolicVerdict, *, related: float, semantic: float
) -> Components:
    """All components of a pair, given how much the two are about the same and what their texts say.

    ``composite`` is the tension of the original KIMERA: the mean of cosine distance, key-set distance and symbol mismatch.
    On its own it ranks unrelated pairs highest, so nothing is decided by it.
    """
    misalignment = min(1.0, max(0.0, 1 - related))
    layers = layer_conflict(a, b)
    mismatch = verdict.differing / verdict.shared if verdict.shared else 0.0
    return Components(
        relatedness=_round(min(1.0, max(0.0, related))),
        semantic=_round(semantic),
        embedding_misalignment=_round(misalignment),
        layer_conflict=_round(layers),
        symbolic_opposition=_round(verdict.opposition),
        composite=_round((misalignment + layers + mismatch) / 3),
    )


def _keys(stored: StoredGeoid) -> set[tuple[str, str]]:
    geoid = stored.geoid
    return {("semantic", key) for key in geoid.semantic_state} | {
        ("symbolic", key) for key in geoid.symbolic_state.keys() - RESERVED_SYMBOLS
    }


def _round(value: float) -> float:
    """Four digits are what the numbers are good for, and what an event need carry."""
    return round(float(value), 4)
