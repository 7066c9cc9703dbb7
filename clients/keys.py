"""``medassist keys``: who may use the gateway, and how much."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from clients.installation import printable
from clients.store import Config, Json, Place, StoreUrl, locate, open_store, say, who
from clients.tables import print_table
from clients.times import parse_duration, parse_time, show_time

if TYPE_CHECKING:
    from serving.tenants.store import StoredKey

app = typer.Typer(help="API keys: who may use the gateway, and how much.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="Of the key, as `medassist keys list` shows it.")]
SecretEnv = Annotated[
    str | None,
    typer.Option(metavar="VAR", help="Environment variable with an own secret; a new one is made if not given."),
]
_LIMITS = {
    "rpm": "requests_per_minute",
    "tpm": "tokens_per_minute",
    "concurrency": "concurrency",
    "max_tokens": "max_tokens",
    "monthly_tokens": "tokens_per_month",
}


@app.command(
    epilog="Examples: medassist keys create --tenant ward-7 --models medassist-86m --rpm 60 --expires 90d > ward.key; "
    "medassist keys create --tenant ops --name grafana --metrics"
)
def create(
    tenant: Annotated[str, typer.Option(help="Whose it is; keys of a tenant share a prefix cache.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    models: Annotated[str | None, typer.Option(metavar="A,B", help="Models it may use; all if not given.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may use /admin, and read the metrics.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read the metrics.")] = False,
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests per minute; no limit if not given.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens per minute, of prompts and answers.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    monthly_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a calendar month, in UTC.")] = None,
    share: Annotated[float, typer.Option(help="Of the capacity under overload, relative to other keys.")] = 1.0,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="90d, 24h, or a day such as 2027-01-31; never if not given.")
    ] = None,
    secret_env: SecretEnv = None,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Makes a key, and prints its secret: once, alone on standard output, and it is stored nowhere."""
    place, secret = locate(config, store), _own_secret(secret_env)
    from serving.tenants.key import KeyLimits

    numbers = (rpm, tpm, concurrency, max_tokens, monthly_tokens)
    limits = KeyLimits(**dict(zip(_LIMITS.values(), numbers, strict=True)))
    chosen = _models(models, place)
    until = None if expires is None else parse_time(expires, "--expires")
    with open_store(place, create=True) as opened:
        key, secret = opened.create_key(
            tenant=tenant, name=name, models=chosen, admin=admin, metrics=metrics, limits=limits, share=share,
            expires=until, secret=secret, by=who(),
        )  # fmt: skip
    _hand_over(key, secret, json)


@app.command("list", epilog="Example: medassist keys list --tenant ward-7")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    active: Annotated[bool, typer.Option("--active", help="Without those that are revoked or expired.")] = False,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Lists the keys, without their secrets."""
    with open_store(locate(config, store)) as opened:
        every = opened.keys()
    found = [key for key in every if tenant in (None, key.tenant) and (not active or key.state() == "active")]
    if json:
        print(orjson.dumps([key.as_json() for key in found]).decode())
        return
    head = ("id", "tenant", "name", "state", "expires", "models", "scopes", "limits", "share")
    rows = [
        (key.id, key.tenant, key.name, key.state(), show_time(key.expires), ",".join(key.models or ("all",)),
         _scopes(key), _limits(key), f"{key.share:g}")
        for key in found
    ]  # fmt: skip
    print_table(head, rows)


@app.command(epilog="Example: medassist keys show key_3f9x2m8q1c7v5b0n")
def show(key_id: KeyId, config: Config = None, store: StoreUrl = None, json: Json = False) -> None:
    """Shows a key, and what it has used this month."""
    from datetime import UTC, datetime

    first = datetime.now(UTC).date().replace(day=1)
    with open_store(locate(config, store)) as opened:
        key = opened.key(key_id)
        (used,) = opened.usage(since=first, key=key_id, by=())
    counts = {
        "requests": used.requests,
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
    }
    if json:
        print(orjson.dumps({**key.as_json(), "month": counts}).decode())
        return
    lines = [
        ("id", key.id),
        ("tenant", key.tenant),
        ("name", key.name),
        ("state", key.state()),
        ("created", show_time(key.created)),
        ("expires", show_time(key.expires)),
        *([("revoked", show_time(key.revoked))] if key.revoked else []),
        *([("origin", key.origin)] if key.origin != key.id else []),
        ("models", ",".join(key.models or ("all",))),
        ("scopes", _scopes(key)),
        *((name, "-" if value is None else f"{value:,}") for name, value in asdict(key.limits).items()),
        ("share", f"{key.share:g}"),
        *((f"{name} this month", f"{count:,}") for name, count in counts.items()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(printable(f"{name:{width}}  {value}".rstrip()))


@app.command(epilog="Example: medassist keys revoke key_3f9x2m8q1c7v5b0n")
def revoke(key_id: KeyId, config: Config = None, store: StoreUrl = None) -> None:
    """Ends a key for good. Gateways refuse it within 5 seconds."""
    with open_store(locate(config, store)) as opened:
        key = opened.revoke(key_id, by=who())
    print(f"{key.id}: revoked at {show_time(key.revoked)} UTC")


@app.command(epilog="Example: medassist keys rotate key_3f9x2m8q1c7v5b0n --overlap 7d > new.key")
def rotate(
    key_id: KeyId,
    overlap: Annotated[str, typer.Option(metavar="TIME", help="How long the old one stays good: 0s, 24h, 7d.")] = "24h",
    secret_env: SecretEnv = None,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Makes a key that takes another's place, with its limits and the rest of its month, and prints its secret."""
    seconds, secret = parse_duration(overlap, "--overlap"), _own_secret(secret_env)
    with open_store(locate(config, store)) as opened:
        key, secret = opened.rotate(key_id, seconds, secret=secret, by=who())
        old = opened.key(key_id)
    _hand_over(key, secret, json)
    say(f"{old.id}: good until {show_time(old.expires)} UTC")


@app.command(epilog="Example: medassist keys update key_3f9x2m8q1c7v5b0n --rpm 120 --monthly-tokens none")
def update(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B", help="Models it may use; all: all.")] = None,
    admin: Annotated[bool | None, typer.Option("--admin/--no-admin", help="It may use /admin.")] = None,
    metrics: Annotated[bool | None, typer.Option("--metrics/--no-metrics", help="It may read the metrics.")] = None,
    rpm: Annotated[str | None, typer.Option(metavar="N", help="Requests per minute; none: no limit.")] = None,
    tpm: Annotated[str | None, typer.Option(metavar="N", help="Tokens per minute; none: no limit.")] = None,
    concurrency: Annotated[str | None, typer.Option(metavar="N", help="Requests at once; none: no limit.")] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="N", help="Longest answer; none: no limit.")] = None,
    monthly_tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens of a month; none: no limit.")] = None,
    share: Annotated[float | None, typer.Option(help="Of the capacity under overload.")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="90d, 24h, or a day such as 2027-01-31; never: never.")
    ] = None,
    config: Config = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Changes what a key may do. Gateways know within 5 seconds; its secret stays."""
    place = locate(config, store)
    changes: dict[str, Any] = {"name": name, "admin": admin, "metrics": metrics, "share": share}
    changes = {option: value for option, value in changes.items() if value is not None}
    if models is not None:
        changes["models"] = None if models == "all" else _models(models, place)
    if expires is not None:
        changes["expires"] = None if expires == "never" else parse_time(expires, "--expires")
    numbers = zip(_LIMITS, (rpm, tpm, concurrency, max_tokens, monthly_tokens), strict=True)
    limits = {_LIMITS[option]: _limit(option, text) for option, text in numbers if text is not None}
    if not changes and not limits:
        raise ValueError("nothing to change: give at least one option")
    with open_store(place) as opened:
        if limits:
            changes["limits"] = replace(opened.key(key_id).limits, **limits)
        key = opened.update_key(key_id, changes, by=who())
    if json:
        print(orjson.dumps(key.as_json()).decode())
    else:
        print(f"{key.id}: {_scopes(key)}; {_limits(key)}; expires {show_time(key.expires)}")


def _own_secret(variable: str | None) -> str | None:
    if variable is None:
        return None
    secret = os.environ.get(variable)
    if not secret:
        raise ValueError(f"--secret-env: the variable {variable} is not set")
    from serving.tenants.secrets import check_strength

    check_strength(secret)  # before a store is made for it
    return secret


def _models(text: str | None, place: Place) -> Sequence[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if place.models is not None:
        for name in names:
            if name not in place.models:
                say(f"warning: the settings have no model {name}", fg="yellow")
    return names


def _limit(option: str, text: str) -> int | None:
    if text == "none":
        return None
    from serving.tenants.stored import LARGEST

    if not re.fullmatch(r"[0-9]{1,16}", text) or not 1 <= int(text) <= LARGEST:
        rule = f"must be a whole number from 1 to {LARGEST}, or none"
        raise ValueError(f"--{option.replace('_', '-')} {rule}, got {text!r}")
    return int(text)


def _hand_over(key: "StoredKey", secret: str, json: bool) -> None:
    """The secret to standard output, alone, so that it can be piped to where it is kept."""
    if json:
        print(orjson.dumps({**key.as_json(), "secret": secret}).decode())
        return
    print(secret, flush=True)
    say(f"{key.id}: {key.tenant}, {_scopes(key)}; {_limits(key)}; expires {show_time(key.expires)}")
    if sys.stdout.isatty():
        say("This is the only time that the secret is shown.", fg="yellow")


def _scopes(key: "StoredKey") -> str:
    return ",".join(["models", *(["admin"] if key.admin else []), *(["metrics"] if key.metrics else [])])


def _limits(key: "StoredKey") -> str:
    found = [f"{option.replace('_', '-')} {value}" for option, name in _LIMITS.items()
             if (value := getattr(key.limits, name)) is not None]  # fmt: skip
    return " ".join(found) or "no limits"
