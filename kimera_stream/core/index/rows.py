"""From geoids to what rows of the index hold, and back: vectors checked, columns gathered."""

from collections.abc import Mapping, Sequence

import numpy as np

from kimera_stream import kernels
from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.index.records import build_state_record
from kimera_stream.core.index.values import ValueCodes
from kimera_stream.core.interfaces import Matrix, StoredGeoid, Vector
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.objects import Geoid

_OFF = 1e-3
"""How far the square of a length may be from 1 before the vector is scaled to it."""


def checked(vector: Vector, dimension: int) -> Vector:
    """The vector at unit length.

    Raises:
        BadRequestError: it has another dimension, or is not finite, or zero.
    """
    vector = np.ascontiguousarray(vector, np.float32)
    if vector.shape != (dimension,):
        raise _of_another(dimension, vector.size)
    length = float(vector @ vector)
    if not abs(length - 1.0) < _OFF:
        if not 0 < length < float("inf"):
            raise _without_direction()
        vector = vector / np.float32(np.sqrt(length))
    return vector


def checked_rows(vectors: Matrix, dimension: int) -> Matrix:
    """The rows at unit length.

    Raises:
        BadRequestError: as ``checked``.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.shape[1:] != (dimension,):
        raise _of_another(dimension, vectors.shape[1])
    lengths = np.einsum("ij,ij->i", vectors, vectors)
    off = ~(np.abs(lengths - 1.0) < _OFF)
    if off.any():
        if not ((lengths > 0) & (lengths < np.inf)).all():
            raise _without_direction()
        vectors = vectors.copy()
        vectors[off] /= np.sqrt(lengths[off])[:, None]
    return vectors


def _of_another(dimension: int, found: int) -> BadRequestError:
    return BadRequestError(
        f"vector: expected {dimension} numbers, as this server's encoder gives, got {found}", field="vector"
    )


def _without_direction() -> BadRequestError:
    return BadRequestError("vector: expected finite numbers that are not all zero", field="vector")


def columns_of(stored: Sequence[StoredGeoid], dimension: int) -> GeoidColumns:
    """The columns of stored geoids, whose vectors have ``dimension`` numbers."""
    vectors = [each.vector for each in stored if each.vector is not None]
    return GeoidColumns(
        [each.geoid.id for each in stored],
        [each.geoid.text for each in stored],
        [each.geoid.symbolic_state for each in stored],
        [list(each.geoid.semantic_state) for each in stored],
        np.array([each.vector is not None for each in stored], np.bool_),
        np.stack(vectors) if vectors else np.zeros((0, dimension), np.float32),
    )


def stored_of(columns: GeoidColumns, place: int) -> StoredGeoid:
    """One of them as a stored geoid; what columns lack is empty."""
    vector = columns.vectors[int(columns.has_vector[:place].sum())] if columns.has_vector[place] else None
    geoid = Geoid(
        id=columns.ids[place],
        version=0,
        text=columns.texts[place],
        semantic_state=dict.fromkeys(columns.layers[place], 0.0),
        symbolic_state=dict(columns.symbols[place]),
        metadata={},
        entropy=0.0,
        created_at=0,
        updated_at=0,
        offset=0,
    )
    return StoredGeoid(geoid, vector, "")


def query_block(
    queries: Sequence[StoredGeoid], dimension: int, codes: ValueCodes, exclude: Mapping[str, int]
) -> kernels.Queries:
    """Statements as a kernel asks with them. ``exclude``: slots by id; a statement that has one does not find itself.

    Raises:
        BadRequestError: a vector has another dimension or is not finite.
    """
    vectors = np.zeros((len(queries), dimension), np.float32)
    for i, query in enumerate(queries):
        if query.vector is not None:
            vectors[i] = checked(query.vector, dimension)
    return kernels.Queries.build(
        vectors,
        has_vector=[query.vector is not None for query in queries],
        text=kernels.text_signatures([query.geoid.text for query in queries]).tolist(),
        records=[
            build_state_record(each.geoid.symbolic_state, each.geoid.semantic_state, codes, store=False)
            for each in queries
        ],
        exclude=[exclude.get(query.geoid.id, -1) for query in queries],
    )
