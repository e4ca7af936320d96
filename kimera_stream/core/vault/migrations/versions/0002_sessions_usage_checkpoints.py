"""Sessions, usage per principal, and checkpoints of accepted work.

Sessions are filled in from the geoids that are there; usage starts counting now.

Revision: 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "session",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("statements", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_session"),
    )
    op.create_index("ix_session_updated_at", "session", ["updated_at"])
    op.execute(
        "INSERT INTO session (id, principal, statements, created_at, updated_at) "
        "SELECT session_id, min(principal), count(*), min(created_at), max(updated_at) "
        "FROM geoid WHERE session_id IS NOT NULL GROUP BY session_id"
    )
    op.create_table(
        "usage",
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("day", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("statements", sa.BigInteger, nullable=False),
        sa.Column("text_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("principal", "day", name="pk_usage"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint"),
    )
    op.create_table(
        "checkpoint_request",
        sa.Column("checkpoint_id", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("merge", sa.Boolean, nullable=False),
        sa.Column("must_exist", sa.Boolean, nullable=False),
        sa.Column("accepted_at", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name="pk_checkpoint_request"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_checkpoint_request_checkpoint_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    for table in ("checkpoint_request", "checkpoint", "usage", "session"):
        op.drop_table(table)
