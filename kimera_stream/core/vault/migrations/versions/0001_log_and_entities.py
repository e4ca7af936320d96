"""The log, the entities and what readers keep.

Revision: 0001, the first.
"""

import secrets
import time

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    state = op.create_table(
        "log_state",
        sa.Column("id", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Text, nullable=False),
        sa.Column("head", sa.BigInteger, nullable=False),
        sa.Column("trimmed", sa.BigInteger, nullable=False),
        sa.Column("payload_bytes", sa.BigInteger, nullable=False),
        sa.Column("encoder", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_log_state"),
    )
    op.bulk_insert(
        state,
        [
            {
                "id": 1,
                "epoch": secrets.token_urlsafe(12),
                "head": 0,
                "trimmed": 0,
                "payload_bytes": 0,
                "encoder": None,
                "created_at": time.time_ns() // 1_000_000,
            }
        ],
    )
    op.create_table(
        "log_entry",
        sa.Column("offset", _NUMBER, autoincrement=False, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("ts", sa.BigInteger, nullable=False),
        sa.Column("channels", sa.Text, nullable=False),
        sa.Column("checksum", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("offset", name="pk_log_entry"),
    )
    op.create_table(
        "log_channel",
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("channel", "offset", name="pk_log_channel"),
        sqlite_with_rowid=False,
    )
    _create_geoids()
    _create_contradictions()
    _create_readers()


def _create_geoids() -> None:
    op.create_table(
        "geoid",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("agent_id", sa.Text),
        sa.Column("purpose", sa.Text),
        sa.Column("entropy", sa.Double, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("semantic_features", sa.Integer, nullable=False),
        sa.Column("symbolic_features", sa.Integer, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("vector", sa.LargeBinary),
        sa.PrimaryKeyConstraint("id", name="pk_geoid"),
    )
    op.create_index("ix_geoid_offset", "geoid", ["offset"])
    for column in ("session_id", "agent_id"):
        given = sa.text(f"{column} IS NOT NULL")
        op.create_index(
            f"ix_geoid_{column}_offset", "geoid", [column, "offset"], sqlite_where=given, postgresql_where=given
        )
    op.create_table(
        "geoid_version",
        sa.Column("geoid_id", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text),
        sa.Column("entropy", sa.Double, nullable=False),
        sa.Column("recorded_at", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text),
        sa.PrimaryKeyConstraint("geoid_id", "offset", name="pk_geoid_version"),
        sqlite_with_rowid=False,
    )
    for table, value in (
        ("semantic_feature", sa.Column("weight", sa.Double, nullable=False)),
        ("symbolic_feature", sa.Column("value", sa.Text, nullable=False)),
    ):
        op.create_table(
            table,
            sa.Column("geoid_id", sa.Text, nullable=False),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("position", sa.Integer, nullable=False),
            value,
            sa.PrimaryKeyConstraint("geoid_id", "name", name=f"pk_{table}"),
            sa.ForeignKeyConstraint(["geoid_id"], ["geoid.id"], name=f"fk_{table}_geoid_id", ondelete="CASCADE"),
            sqlite_with_rowid=False,
        )


def _create_contradictions() -> None:
    op.create_table(
        "contradiction",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("a", sa.Text, nullable=False),
        sa.Column("b", sa.Text, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("relatedness", sa.Double, nullable=False),
        sa.Column("semantic", sa.Double, nullable=False),
        sa.Column("embedding_misalignment", sa.Double, nullable=False),
        sa.Column("layer_conflict", sa.Double, nullable=False),
        sa.Column("symbolic_opposition", sa.Double, nullable=False),
        sa.Column("composite", sa.Double, nullable=False),
        sa.Column("gradient_type", sa.Text, nullable=False),
        sa.Column("pulse_strength", sa.Double, nullable=False),
        sa.Column("decision", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("provisional", sa.Boolean, nullable=False),
        sa.Column("detected_at", sa.BigInteger, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("a_text", sa.Text),
        sa.Column("b_text", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_contradiction"),
    )
    for columns in (["offset"], ["state", "offset"], ["a"], ["b"]):
        op.create_index(f"ix_contradiction_{'_'.join(columns)}", "contradiction", columns)
    op.create_table(
        "scar",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("contradiction_id", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("a", sa.Text, nullable=False),
        sa.Column("b", sa.Text, nullable=False),
        sa.Column("decision", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("resolved_by", sa.Text, nullable=False),
        sa.Column("vault", sa.Text, nullable=False),
        sa.Column("pre_entropy", sa.Double, nullable=False),
        sa.Column("post_entropy", sa.Double, nullable=False),
        sa.Column("delta_entropy", sa.Double, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_scar"),
    )
    for columns in (["offset"], ["vault", "weight"], ["contradiction_id"]):
        op.create_index(f"ix_scar_{'_'.join(columns)}", "scar", columns)


def _create_readers() -> None:
    op.create_table(
        "watch",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("contradicts", sa.Boolean, nullable=False),
        sa.Column("related", sa.Boolean, nullable=False),
        sa.Column("min_score", sa.Double),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("filter", sa.Text),
        sa.Column("vector", sa.LargeBinary),
        sa.PrimaryKeyConstraint("id", name="pk_watch"),
        sa.UniqueConstraint("principal", "name", name="uq_watch_principal_name"),
    )
    op.create_table(
        "cursor",
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("epoch", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("principal", "name", "channel", name="pk_cursor"),
    )
    op.create_table(
        "idempotency_key",
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("result", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("principal", "key", name="pk_idempotency_key"),
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
    op.create_table(
        "audit_entry",
        sa.Column("id", _NUMBER, autoincrement=True, nullable=False),
        sa.Column("ts", sa.BigInteger, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_entry"),
    )
    op.create_index("ix_audit_entry_ts", "audit_entry", ["ts"])


def downgrade() -> None:
    for table in (
        "audit_entry",
        "idempotency_key",
        "cursor",
        "watch",
        "scar",
        "contradiction",
        "symbolic_feature",
        "semantic_feature",
        "geoid_version",
        "geoid",
        "log_channel",
        "log_entry",
        "log_state",
    ):
        op.drop_table(table)
