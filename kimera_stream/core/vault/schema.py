"""The tables, the same on SQLite and PostgreSQL. The migrations make them; a test compares the two.

``log_entry`` holds the public events as they were encoded; everything else is relational. Offsets of entities point at
their newest entry of the log. JSON appears where the user's own payload is free-form (metadata, a filter), for lists of
sentences and one scalar of a symbolic feature, and where a message is kept whole: the reply of a keyed request, to be given
again, and a request that was accepted and is not carried out (``docs/adr/0002-log-and-vault.md``; a test has the list).
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy import text as literal_text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# An INTEGER PRIMARY KEY is the row's own number in SQLite: no second tree, and appends go to the end.
Number = BigInteger().with_variant(Integer, "sqlite")

log_state = Table(
    "log_state",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", Text, nullable=False),
    Column("head", BigInteger, nullable=False),
    Column("trimmed", BigInteger, nullable=False),
    Column("payload_bytes", BigInteger, nullable=False),
    Column("encoder", Text),
    Column("created_at", BigInteger, nullable=False),
)
"""One row, id 1: the identity and the ends of the log. Its lock orders writers."""

log_entry = Table(
    "log_entry",
    metadata,
    Column("offset", Number, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("ts", BigInteger, nullable=False),
    Column("channels", Text, nullable=False),
    Column("checksum", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

log_channel = Table(
    "log_channel",
    metadata,
    Column("channel", Text, primary_key=True),
    Column("offset", BigInteger, primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)
"""Which entries show on a channel: what a page of one channel is found by."""

geoid = Table(
    "geoid",
    metadata,
    Column("id", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("principal", Text, nullable=False),
    Column("session_id", Text),
    Column("agent_id", Text),
    Column("purpose", Text),
    Column("entropy", Double, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("semantic_features", Integer, nullable=False),
    Column("symbolic_features", Integer, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("text", Text),
    Column("vector", LargeBinary),
    Column("stated", BigInteger, nullable=False, server_default=literal_text("0")),
    Index(None, "offset"),
)
"""``stated``: offset of the entry that last changed what it states; 0: that of its version."""
Index("ix_geoid_text", geoid.c.text, postgresql_using="hash").ddl_if(dialect="postgresql")
"""Who says the same as a watch is asked where several nodes write. A hash, for a text may be longer than a tree's entry."""
for _column in (geoid.c.session_id, geoid.c.agent_id):
    Index(
        None,
        _column,
        geoid.c.offset,
        sqlite_where=_column.is_not(None),
        postgresql_where=_column.is_not(None),
    )

geoid_version = Table(
    "geoid_version",
    metadata,
    Column("geoid_id", Text, primary_key=True),
    Column("offset", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("principal", Text, nullable=False),
    Column("purpose", Text),
    Column("entropy", Double, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
    Column("text", Text),
    sqlite_with_rowid=False,
)
"""What each geoid said when; a deletion is its last version. Outlives the geoid and the retention of the log."""

semantic_feature = Table(
    "semantic_feature",
    metadata,
    Column("geoid_id", Text, ForeignKey("geoid.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("weight", Double, nullable=False),
    sqlite_with_rowid=False,
)

symbolic_feature = Table(
    "symbolic_feature",
    metadata,
    Column("geoid_id", Text, ForeignKey("geoid.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("value", Text, nullable=False),
    sqlite_with_rowid=False,
)
"""``value`` is one JSON scalar, which keeps 1, 1.0, true and "1" apart."""

contradiction = Table(
    "contradiction",
    metadata,
    Column("id", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("a", Text, nullable=False),
    Column("b", Text, nullable=False),
    Column("score", Double, nullable=False),
    Column("relatedness", Double, nullable=False),
    Column("semantic", Double, nullable=False),
    Column("embedding_misalignment", Double, nullable=False),
    Column("layer_conflict", Double, nullable=False),
    Column("symbolic_opposition", Double, nullable=False),
    Column("composite", Double, nullable=False),
    Column("gradient_type", Text, nullable=False),
    Column("pulse_strength", Double, nullable=False),
    Column("decision", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("provisional", Boolean, nullable=False),
    Column("detected_at", BigInteger, nullable=False),
    Column("why", Text, nullable=False),
    Column("a_text", Text),
    Column("b_text", Text),
    Index(None, "offset"),
    Index(None, "state", "offset"),
    Index(None, "a"),
    Index(None, "b"),
)
"""``why`` is a JSON list of sentences."""

scar = Table(
    "scar",
    metadata,
    Column("id", Text, primary_key=True),
    Column("contradiction_id", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("a", Text, nullable=False),
    Column("b", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("reason", Text),
    Column("resolved_by", Text, nullable=False),
    Column("vault", Text, nullable=False),
    Column("pre_entropy", Double, nullable=False),
    Column("post_entropy", Double, nullable=False),
    Column("delta_entropy", Double, nullable=False),
    Column("weight", Double, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "offset"),
    Index(None, "vault", "weight"),
    Index(None, "contradiction_id"),
)

watch = Table(
    "watch",
    metadata,
    Column("id", Text, primary_key=True),
    Column("principal", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("contradicts", Boolean, nullable=False),
    Column("related", Boolean, nullable=False),
    Column("min_score", Double),
    Column("created_at", BigInteger, nullable=False),
    Column("text", Text),
    Column("filter", Text),
    Column("vector", LargeBinary),
    UniqueConstraint("principal", "name"),
)

cursor = Table(
    "cursor",
    metadata,
    Column("principal", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("epoch", Text, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)
"""Where a durable reader is. A cursor of another epoch counts as none."""

idempotency_key = Table(
    "idempotency_key",
    metadata,
    Column("principal", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False, index=True),
    Column("result", LargeBinary, nullable=False),
    Column("checksum", BigInteger),
)
"""``result`` is the JSON of the first reply. ``checksum`` covers the rest of the row, and is verified on every read; null: written by an earlier version."""

revocation = Table(
    "revocation",
    metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("revoked_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index(None, "kind", "subject"),
)
"""Tokens that no longer count. Written under the log's lock, so that who has read up to an id has missed none below it.
``expires_at`` (unix ms): from then on the token is refused anyway."""

audit_entry = Table(
    "audit_entry",
    metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False, index=True),
    Column("principal", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
)

session = Table(
    "session",
    metadata,
    Column("id", Text, primary_key=True),
    Column("principal", Text, nullable=False),
    Column("statements", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False, index=True),
)

usage = Table(
    "usage",
    metadata,
    Column("principal", Text, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("statements", BigInteger, nullable=False),
    Column("text_bytes", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False, server_default=literal_text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=literal_text("0")),
)
"""What each principal published per day (days since 1970, UTC). ``tokens``: as the encoder counted them. ``bytes``: of text, states, metadata
and vectors that were brought along (``core.kept.UsageRecord``)."""

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
"""A graceful stop that left accepted work behind."""

checkpoint_request = Table(
    "checkpoint_request",
    metadata,
    Column("checkpoint_id", Text, ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("principal", Text, nullable=False),
    Column("session_id", Text),
    Column("idempotency_key", Text),
    Column("priority", SmallInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("merge", Boolean, nullable=False),
    Column("must_exist", Boolean, nullable=False),
    Column("accepted_at", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("not_before", BigInteger, nullable=False, server_default=literal_text("0")),
)
"""``body`` is the request's geoid as JSON, as it was accepted. ``attempts`` counts from when somebody takes it up; ``not_before``
(unix ms) is when it may be taken up next: later while somebody works on it, and after a failure."""

dead_letter = Table(
    "dead_letter",
    metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("principal", Text, nullable=False),
    Column("session_id", Text),
    Column("idempotency_key", Text),
    Column("priority", SmallInteger, nullable=False),
    Column("merge", Boolean, nullable=False),
    Column("must_exist", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("accepted_at", BigInteger, nullable=False),
    Column("failed_at", BigInteger, nullable=False),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
"""Accepted work that could not be done: set aside for a person, who has it tried again or drops it."""

cluster = Table(
    "cluster",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("slices", Integer, nullable=False),
    Column("watch_generation", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
"""One row, id 1, once several nodes have been set up on this database. Times here and below: unix ms of the database."""

node = Table(
    "node",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("reachable", Boolean, nullable=False),
)
"""``reachable``: whether work gets there; a node that is cut off from the bus, or is to stop, says of itself that it does not."""

geoid_slice = Table(
    "slice",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text),
    Column("generation", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
    Column("scored", BigInteger, nullable=False),
    Column("unread", BigInteger),
    Column("heir", Text),
)
"""``generation`` grows whenever a slice changes hands. ``scored``: everything in the log up to there has been judged against
its geoids. ``unread``: from there on the verifier has not read all of it; null: it has. ``heir``: the node that has its geoids ready
and waits for it; the owner, until it has them itself."""

lease = Table(
    "lease",
    metadata,
    Column("duty", Text, primary_key=True),
    Column("owner", Text),
    Column("generation", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
)
"""What one node does for all."""
