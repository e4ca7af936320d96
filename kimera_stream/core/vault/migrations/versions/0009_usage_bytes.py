"""Bytes of all that was said per principal and day, beside those of the text.

What was published before was counted by its text alone: those days say 0.

Revision: 0009, after 0008.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("bytes", sa.BigInteger, nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    op.drop_column("usage", "bytes")
