"""Tables of the store, as SQLAlchemy's Core knows them, at the revision that this version of the program works with.

Columns are integers, floats and text alone, so that rows are the same through any driver: times are whole seconds since
the epoch, truth is 0 or 1, lists are JSON. ``migrations`` makes a database that has these tables.
"""

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Table, Text

REVISION = "0003"
"""Of ``migrations``; a database at another one is not used."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True),
    Column("cache_salt", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenants.name"), nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),  # SHA-256 of the secret, in hexadecimal digits
    Column("models", Text),  # a JSON list; NULL: all
    Column("admin", Integer, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
    Column("max_tokens", BigInteger),
    Column("tokens_per_month", BigInteger),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger),
    Column("revoked", BigInteger),
    Column("metrics", Integer, nullable=False, server_default="0"),
    Column("share", Double, nullable=False, server_default="1"),
    # The first of the keys that each took the place of the one before; they have one monthly budget together.
    Column("origin", Text, nullable=False),
    Index("ix_keys_origin", "origin"),
)

usage = Table(
    "usage",
    metadata,
    Column("day", Text, primary_key=True),  # YYYY-MM-DD, in UTC
    Column("key", Text, primary_key=True),  # empty: nobody's
    Column("model", Text, primary_key=True),  # empty: the request did not come so far
    Column("tenant", Text, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),  # requests whose tokens are our estimate
    Index("ix_usage_key_day", "key", "day"),
)

# How far each journal is in ``usage``: written in the same transaction, so that nothing is counted twice.
journals = Table(
    "journals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),  # -1: it is finished, and its file is removed
    Column("updated", BigInteger, nullable=False),
)

# "keys_version": a number, one more with every change of keys or captures; "audit_secret", "store_id".
facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

# The last line of each audit log, so that a log that was cut short shows.
audit_heads = Table(
    "audit_heads",
    metadata,
    Column("log", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    Column("updated", BigInteger, nullable=False),
)

captures = Table(
    "captures",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key", Text, ForeignKey("keys.id"), nullable=False),
    Column("recipient", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("ended", BigInteger),
)
