"""Several nodes: who is there, who owns which slice, who has which duty; and since when a geoid states what it states.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("geoid", sa.Column("stated", sa.BigInteger, nullable=False, server_default=sa.text("0")))
    op.create_table(
        "cluster",
        sa.Column("id", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("slices", sa.Integer, nullable=False),
        sa.Column("watch_generation", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_cluster"),
    )
    op.create_table(
        "node",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.Column("reachable", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_node"),
    )
    op.create_table(
        "slice",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("scored", sa.BigInteger, nullable=False),
        sa.Column("unread", sa.BigInteger),
        sa.Column("heir", sa.Text),
        sa.PrimaryKeyConstraint("number", name="pk_slice"),
    )
    op.create_table(
        "lease",
        sa.Column("duty", sa.Text, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("duty", name="pk_lease"),
    )


def downgrade() -> None:
    for table in ("lease", "slice", "node", "cluster"):
        op.drop_table(table)
    op.drop_column("geoid", "stated")
