"""Alembic's migrations of the vault, packaged with it; ``core.vault.migrate`` runs them."""
