"""Dead letters, and when a request that was kept may be tried (again).

Requests that were kept before may be tried at once.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column(
        "checkpoint_request", sa.Column("not_before", sa.BigInteger, nullable=False, server_default=sa.text("0"))
    )
    op.create_table(
        "dead_letter",
        sa.Column("id", _NUMBER, autoincrement=True, nullable=False),
        sa.Column("principal", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("merge", sa.Boolean, nullable=False),
        sa.Column("must_exist", sa.Boolean, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("accepted_at", sa.BigInteger, nullable=False),
        sa.Column("failed_at", sa.BigInteger, nullable=False),
        sa.Column("error_code", sa.Text, nullable=False),
        sa.Column("error_message", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letter"),
    )


def downgrade() -> None:
    op.drop_table("dead_letter")
    op.drop_column("checkpoint_request", "not_before")
