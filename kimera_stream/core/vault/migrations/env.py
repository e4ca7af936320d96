"""Runs the migrations on the connection that ``core.vault.migrate`` hands over; the transaction is its caller's."""

from alembic import context

from kimera_stream.core.vault.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
