"""What Alembic executes around the migrations; ``serving.tenants.database`` gives it a connection in a transaction."""

from alembic import context

from serving.tenants.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by making it again
    transactional_ddl=True,  # SQLite's driver is told to begin the transaction, so that tables are part of it
)
context.run_migrations()
