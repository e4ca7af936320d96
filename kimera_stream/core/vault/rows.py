"""Public objects as rows and back."""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import msgspec
import numpy as np

from kimera_stream.core.interfaces import IdempotencyRecord, StoredGeoid, Vector
from kimera_stream.core.vault import schema
from kimera_stream.core.vault.errors import DamagedVaultError
from kimera_stream.protocol.objects import Components, Contradiction, Geoid, Scalar, Scar, Watch, WatchKind

Row = Sequence[Any]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_why = msgspec.json.Decoder(list[str]).decode

GEOID_COLUMNS = tuple(schema.geoid.c[name] for name in (
    "id", "version", "offset", "principal", "session_id", "agent_id", "purpose", "entropy", "created_at", "updated_at",
    "semantic_features", "symbolic_features", "metadata", "text",
))  # fmt: skip
STORED_GEOID_COLUMNS = (*GEOID_COLUMNS, schema.geoid.c.vector, schema.geoid.c.stated)


def vector_bytes(vector: Vector | None) -> bytes | None:
    """Little-endian float32."""
    return None if vector is None else vector.astype("<f4", copy=False).tobytes()


def vector_of(stored: bytes | None) -> Vector | None:
    """A writable array of its own: compiled kernels take no read-only buffers."""
    return None if stored is None else np.frombuffer(stored, dtype="<f4").astype(np.float32)


def geoid_row(stored: StoredGeoid) -> Row:
    geoid = stored.geoid
    return (
        geoid.id,
        geoid.version,
        geoid.offset,
        stored.principal,
        geoid.session_id,
        geoid.originator_agent_id,
        geoid.purpose,
        float(geoid.entropy),
        geoid.created_at,
        geoid.updated_at,
        len(geoid.semantic_state),
        len(geoid.symbolic_state),
        _encode(geoid.metadata).decode() if geoid.metadata else "{}",
        geoid.text,
        vector_bytes(stored.vector),
        stored.stated or geoid.offset,
    )


def version_row(stored: StoredGeoid) -> Row:
    geoid = stored.geoid
    return (
        geoid.id,
        geoid.offset,
        geoid.version,
        False,
        stored.principal,
        geoid.purpose,
        float(geoid.entropy),
        geoid.updated_at,
        geoid.text,
    )


def tombstone_row(stored: StoredGeoid, offset: int, now: int) -> Row:
    """The last version of a geoid: its deletion."""
    geoid = stored.geoid
    return (geoid.id, offset, geoid.version + 1, True, stored.principal, geoid.purpose, float(geoid.entropy), now, None)


def semantic_rows(geoid: Geoid) -> list[Row]:
    return [(geoid.id, name, i, float(weight)) for i, (name, weight) in enumerate(geoid.semantic_state.items())]


def symbolic_rows(geoid: Geoid) -> list[Row]:
    return [
        (geoid.id, name, i, _encode(value).decode()) for i, (name, value) in enumerate(geoid.symbolic_state.items())
    ]


def geoid_of(row: Row, semantic: Mapping[str, dict[str, float]], symbolic: Mapping[str, dict[str, Scalar]]) -> Geoid:
    """The geoid of a row of ``GEOID_COLUMNS`` (or more), with its features by geoid id."""
    id_, version, offset, _, session_id, agent_id, purpose, entropy, created_at, updated_at, _, _, metadata, text = row[
        :14
    ]
    return Geoid(
        id=id_,
        version=version,
        text=text,
        semantic_state=semantic.get(id_, {}),
        symbolic_state=symbolic.get(id_, {}),
        metadata={} if metadata == "{}" else _decode(metadata),
        session_id=session_id,
        originator_agent_id=agent_id,
        purpose=purpose,
        entropy=entropy,
        created_at=created_at,
        updated_at=updated_at,
        offset=offset,
    )


def stored_geoid_of(
    row: Row, semantic: Mapping[str, dict[str, float]], symbolic: Mapping[str, dict[str, Scalar]]
) -> StoredGeoid:
    """The stored geoid of a row of ``STORED_GEOID_COLUMNS``."""
    geoid = geoid_of(row, semantic, symbolic)
    return StoredGeoid(geoid, vector_of(row[14]), row[3], stated=row[15] or geoid.offset)


def semantic_states(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """States by geoid id, of rows (geoid id, name, weight) in the order of their keys."""
    states: dict[str, dict[str, float]] = {}
    for geoid_id, name, weight in rows:
        states.setdefault(geoid_id, {})[name] = weight
    return states


def symbolic_states(rows: Sequence[Row]) -> dict[str, dict[str, Scalar]]:
    """States by geoid id, of rows (geoid id, name, value as JSON) in the order of their keys."""
    states: dict[str, dict[str, Scalar]] = {}
    for geoid_id, name, value in rows:
        states.setdefault(geoid_id, {})[name] = _decode(value)
    return states


CONTRADICTION_COLUMNS = tuple(schema.contradiction.columns)


def contradiction_row(found: Contradiction) -> Row:
    parts = found.components
    return (
        found.id,
        found.version,
        found.offset,
        found.state,
        found.a,
        found.b,
        float(found.score),
        float(parts.relatedness),
        float(parts.semantic),
        float(parts.embedding_misalignment),
        float(parts.layer_conflict),
        float(parts.symbolic_opposition),
        float(parts.composite),
        found.gradient_type,
        float(found.pulse_strength),
        found.decision,
        found.model,
        found.provisional,
        found.detected_at,
        _encode(found.why).decode(),
        found.a_text,
        found.b_text,
    )


def contradiction_of(row: Row) -> Contradiction:
    """The contradiction of a row of ``CONTRADICTION_COLUMNS``."""
    return Contradiction(
        id=row[0],
        version=row[1],
        offset=row[2],
        state=row[3],
        a=row[4],
        b=row[5],
        score=row[6],
        components=Components(
            relatedness=row[7],
            semantic=row[8],
            embedding_misalignment=row[9],
            layer_conflict=row[10],
            symbolic_opposition=row[11],
            composite=row[12],
        ),
        gradient_type=row[13],
        pulse_strength=row[14],
        decision=row[15],
        model=row[16],
        provisional=bool(row[17]),
        detected_at=row[18],
        why=_why(row[19]),
        a_text=row[20],
        b_text=row[21],
    )


SCAR_COLUMNS = tuple(schema.scar.columns)


def scar_row(scar: Scar) -> Row:
    return (
        scar.id,
        scar.contradiction_id,
        scar.offset,
        *scar.geoids,
        scar.decision,
        scar.reason,
        scar.resolved_by,
        scar.vault,
        float(scar.pre_entropy),
        float(scar.post_entropy),
        float(scar.delta_entropy),
        float(scar.weight),
        scar.created_at,
    )


def scar_of(row: Row) -> Scar:
    """The scar of a row of ``SCAR_COLUMNS``."""
    return Scar(
        id=row[0],
        contradiction_id=row[1],
        offset=row[2],
        geoids=(row[3], row[4]),
        decision=row[5],
        reason=row[6],
        resolved_by=row[7],
        vault=row[8],
        pre_entropy=row[9],
        post_entropy=row[10],
        delta_entropy=row[11],
        weight=row[12],
        created_at=row[13],
    )


WATCH_COLUMNS = tuple(schema.watch.columns)


def watch_row(watch: Watch, vector: Vector | None) -> Row:
    return (
        watch.id,
        watch.principal,
        watch.watch,
        "contradicts" in watch.kinds,
        "related" in watch.kinds,
        None if watch.min_score is None else float(watch.min_score),
        watch.created_at,
        watch.text,
        None if watch.filter is None else _encode(watch.filter).decode(),
        vector_bytes(vector),
    )


def watch_of(row: Row) -> tuple[Watch, Vector | None]:
    """The watch of a row of ``WATCH_COLUMNS``, and its vector."""
    kinds: list[WatchKind] = []
    if row[3]:
        kinds.append("contradicts")
    if row[4]:
        kinds.append("related")
    watch = Watch(
        id=row[0],
        principal=row[1],
        watch=row[2],
        kinds=kinds,
        min_score=row[5],
        created_at=row[6],
        text=row[7],
        filter=None if row[8] is None else _decode(row[8]),
    )
    return watch, vector_of(row[9])


RECORD_COLUMNS = (
    schema.idempotency_key.c.principal,
    schema.idempotency_key.c.key,
    schema.idempotency_key.c.result,
    schema.idempotency_key.c.created_at,
    schema.idempotency_key.c.checksum,
)


def _record_checksum(record: IdempotencyRecord) -> int:
    return crc32(record.result, crc32(f"{record.principal}\0{record.key}\0{record.created_at}".encode()))


def record_row(record: IdempotencyRecord) -> Row:
    """In the order of the table's columns."""
    return record.principal, record.key, record.created_at, record.result, _record_checksum(record)


def record_of(row: Row) -> IdempotencyRecord:
    """A row of ``RECORD_COLUMNS``.

    Raises:
        DamagedVaultError: it is not what was committed.
    """
    record = IdempotencyRecord(row[0], row[1], bytes(row[2]), row[3])
    if row[4] is not None and row[4] != _record_checksum(record):
        raise DamagedVaultError("the first result of a keyed request does not match its checksum")
    return record
