"""A key's share and its scope for metrics; a budget that outlasts the rotation of a key; usage by key."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("keys") as keys:
        keys.add_column(sa.Column("metrics", sa.Integer, nullable=False, server_default="0"))
        keys.add_column(sa.Column("share", sa.Double, nullable=False, server_default="1"))
        keys.add_column(sa.Column("origin", sa.Text))
    op.execute("UPDATE keys SET origin = id")
    with op.batch_alter_table("keys") as keys:
        keys.alter_column("origin", existing_type=sa.Text(), nullable=False)
        keys.create_index("ix_keys_origin", ["origin"])
    op.create_index("ix_usage_key_day", "usage", ["key", "day"])
    _tell_gateways()


def downgrade() -> None:
    op.drop_index("ix_usage_key_day", "usage")
    with op.batch_alter_table("keys") as keys:
        keys.drop_index("ix_keys_origin")
        keys.drop_column("origin")
        keys.drop_column("share")
        keys.drop_column("metrics")
    _tell_gateways()


def _tell_gateways() -> None:
    op.execute("UPDATE facts SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE name = 'keys_version'")
