"""A checksum beside the first result of a keyed request. Those that are there have none, and are over within the window.

Revision: 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("idempotency_key", sa.Column("checksum", sa.BigInteger))


def downgrade() -> None:
    op.drop_column("idempotency_key", "checksum")
