"""The SQL that the keeper executes through the drivers, without SQLAlchemy in its process."""

from typing import Any

from sqlalchemy import BigInteger, Insert, and_, bindparam, func, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import Dialect

from serving.tenants import schema
from serving.tenants.store_url import connect_arguments, sqlite_path

__all__ = ["compile_statements", "connect_arguments"]


def compile_statements(url: str) -> dict[str, str]:
    """SQL for the store at ``url``, by name, with named parameters in the style of its driver: ``:name`` of sqlite3,
    ``%(name)s`` of psycopg.

    ============== ============================================ ====================================================
    name           parameters                                   rows, or what it does
    ============== ============================================ ====================================================
    begin          -                                            begins a transaction that may write
    commit         -
    rollback       -
    revision       -                                            one value, to compare with ``schema.REVISION``
    version        -                                            one value; read it before "keys" and "captures"
    keys           -                                            all columns of keys, and cache_salt; revoked ones, too
    captures       now                                          all columns of those that are active
    spent          month ("2026-11-01")                         key, tokens; of keys with a monthly budget
    position       id                                           one value
    begin_journal  id, now                                      at position 0, unless it is there
    advance        id, old, new, now                            1 row, or 0: it is not at ``old``
    add_usage      day, key, tenant, model, requests, failed,   adds to the row, or begins it
                   prompt_tokens, completion_tokens, estimated
    head           log, sequence, hash, now                     never goes back
    stored_head    log                                          sequence, hash
    forget_journals before                                      those finished (position -1) before
    fact           name                                         one value
    ============== ============================================ ====================================================

    Rows of a transaction that calls "add_usage" go in the order of (day, key, model): else two gateways could wait for
    each other.

    Raises:
        ValueError: it is no address of a store.
    """
    on_sqlite = sqlite_path(url) is not None
    dialect: Dialect = sqlite.dialect(paramstyle="named") if on_sqlite else PGDialect_psycopg()
    compiled = {name: str(statement.compile(dialect=dialect)) for name, statement in _build(on_sqlite).items()}
    return {
        # Immediate: a transaction that reads first and writes later could fail in between, whatever the timeout.
        "begin": "BEGIN IMMEDIATE" if on_sqlite else "BEGIN",
        "commit": "COMMIT",
        "rollback": "ROLLBACK",
        "revision": "SELECT version_num FROM alembic_version",
        **compiled,
    }


def add_usage(on_sqlite: bool) -> Insert:
    """The ledger's upsert; parameters are the columns."""
    counts = ("requests", "failed", "prompt_tokens", "completion_tokens", "estimated")
    statement: Any = (sqlite.insert if on_sqlite else postgresql.insert)(schema.usage)
    statement = statement.values({column.name: bindparam(column.name) for column in schema.usage.c})
    added = {name: schema.usage.c[name] + statement.excluded[name] for name in counts}
    result: Insert = statement.on_conflict_do_update(index_elements=["day", "key", "model"], set_=added)
    return result


def set_head(on_sqlite: bool) -> Insert:
    """The upsert of an audit log's last line; parameters: log, sequence, hash, now."""
    heads = schema.audit_heads
    statement: Any = (sqlite.insert if on_sqlite else postgresql.insert)(heads)
    names = {"log": "log", "sequence": "sequence", "hash": "hash", "updated": "now"}
    statement = statement.values({column: bindparam(name) for column, name in names.items()})
    new = statement.excluded
    result: Insert = statement.on_conflict_do_update(
        index_elements=["log"],
        set_={name: new[name] for name in ("sequence", "hash", "updated")},
        where=heads.c.sequence < new.sequence,
    )
    return result


def _build(on_sqlite: bool) -> dict[str, Any]:
    keys, usage, journals = schema.keys, schema.usage, schema.journals
    captures, facts, heads = schema.captures, schema.facts, schema.audit_heads
    begin_journal: Any = (sqlite.insert if on_sqlite else postgresql.insert)(journals)
    begin_journal = begin_journal.values(id=bindparam("id"), position=literal_column("0"), updated=bindparam("now"))
    family = keys.alias("family")
    tokens = func.sum(usage.c.prompt_tokens + usage.c.completion_tokens).cast(BigInteger)  # else PostgreSQL's numeric
    return {
        "version": select(facts.c.value).where(facts.c.name == literal_column("'keys_version'")),
        "keys": select(keys, schema.tenants.c.cache_salt).join(schema.tenants).order_by(keys.c.id),
        "captures": select(captures)
        .where(and_(captures.c.ended.is_(None), captures.c.expires > bindparam("now")))
        .order_by(captures.c.id),
        "spent": select(keys.c.id.label("key"), tokens.label("tokens"))
        .select_from(keys.join(family, family.c.origin == keys.c.origin).join(usage, usage.c.key == family.c.id))
        .where(and_(keys.c.tokens_per_month.is_not(None), usage.c.day >= bindparam("month")))
        .group_by(keys.c.id),
        "position": select(journals.c.position).where(journals.c.id == bindparam("id")),
        "begin_journal": begin_journal.on_conflict_do_nothing(index_elements=["id"]),
        "advance": update(journals)
        .where(and_(journals.c.id == bindparam("id"), journals.c.position == bindparam("old")))
        .values(position=bindparam("new"), updated=bindparam("now")),
        "add_usage": add_usage(on_sqlite),
        "head": set_head(on_sqlite),
        "stored_head": select(heads.c.sequence, heads.c.hash).where(heads.c.log == bindparam("log")),
        "forget_journals": schema.journals.delete().where(
            and_(journals.c.position < literal_column("0"), journals.c.updated < bindparam("before"))
        ),
        "fact": select(facts.c.value).where(facts.c.name == bindparam("name")),
    }
