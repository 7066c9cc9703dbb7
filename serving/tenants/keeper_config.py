"""What is found out before a gateway serves: whether its store can be used, whether others can reach it without a key,
and the configuration of its keeper."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from serving.gateway.operations import DEFAULT_STORE
from serving.gateway.settings import Settings
from serving.tenants.announcing import make_folders
from serving.tenants.bookkeeping import CONFIG, LATER, identify, write_private
from serving.tenants.key_files import KeyFiles
from serving.tenants.store_url import URL_VARIABLE

NO_STORE = "none"  # instead of a store's id, in names of journals' folders


@dataclass(frozen=True)
class Standing:
    """How a gateway with some settings would serve.

    Attributes:
        store: where its store is, for people; None: it has none.
        keys: whether requests need a key.
    """

    store: str | None
    keys: bool


def examine(settings: Settings) -> Standing:
    """Asks the store, if there is one.

    Raises:
        ValueError: the store or the home folder cannot be used, the store is gone, or others can reach the gateway
            while nobody needs a key. The message says what to do.
    """
    home = settings.home_folder
    store, keys = None, False
    if settings.keeps_accounts:
        from serving.tenants.store import Store, StoreError

        try:
            with Store(_url(settings)) as database:
                store, keys = database.where, database.has_keys()
        except StoreError as e:
            raise ValueError(f"{e} (without it, nobody knows whether requests need a key)") from None
    elif (home / "audit" / "head").exists():
        raise ValueError(
            f"the store is gone: {home / 'audit'} is the audit log of one. Restore {home / DEFAULT_STORE}, or say "
            f"where it is (store.url, or {URL_VARIABLE}), or move {home / 'audit'} away"
        )
    if not keys:
        _refuse_exposure(settings)
    if settings.keeps_accounts:
        make_folders(home, "journal", "audit")
    elif settings.log.requests or settings.tracing.endpoint:
        make_folders(home, "journal")
    return Standing(store, keys)


def write_config(settings: Settings, folder: Path, file: Path | None = None) -> Path | None:
    """Writes the keeper's configuration into a private folder, which becomes that of
    :class:`serving.tenants.bookkeeping.Bookkeeping` and of the workers.

    Args:
        file: the settings' file, for the audit log.

    Returns:
        The file, which can hold the store's password; the keeper removes it. None: nothing has to be kept as long as
        there is no store.

    Raises:
        ValueError: the store cannot be used.
        OSError: the folder cannot be written.
    """
    from serving.tenants.schema import REVISION
    from serving.tenants.statements import compile_statements, connect_arguments

    home, url = settings.home_folder, _url(settings)
    log = settings.log.model_dump(mode="json") if settings.log.requests else None
    tracing = settings.tracing.model_dump(mode="json") if settings.tracing.endpoint else None
    store = {**connect_arguments(url), "statements": compile_statements(url)}
    audit = {
        "folder": str(home / "audit"),
        "requests": settings.audit.requests,
        "retention_days": settings.audit.retention_days,
    }
    content: dict[str, Any] = {
        "accounts": str(folder),
        "journals": str(home / "journal"),
        "store_id": NO_STORE,
        "store": None,
        "audit": None,
        "log": log,
        "tracing": tracing,
        "settings": str(file.absolute()) if file else None,
    }
    folder.mkdir(mode=0o700, exist_ok=True)
    if settings.keeps_accounts:
        store_id, secret = identify(store, REVISION)
        content |= {"store_id": store_id, "store": store, "audit": {**audit, "secret": secret}}
    else:
        KeyFiles(folder, None).put_keys("", [], [])
        write_private(folder / LATER, {**content, "store": store, "audit": audit, "revision": REVISION})
        if log is None and tracing is None:
            return None
    write_private(folder / CONFIG, content)
    return folder / CONFIG


def open_to(listener: socket.socket) -> str:
    """What to tell the operator of a gateway that needs no key."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"no keys yet: whoever reaches {host}:{port} is served; `medassist keys create` makes the first"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(settings: Settings) -> str:
    return settings.store.resolve(settings.home_folder)


def _refuse_exposure(settings: Settings) -> None:
    hosts = {"host": settings.host}
    if settings.admin.port is not None:
        hosts["admin.host"] = settings.admin.host
    for name, host in hosts.items():
        if not is_loopback(host):
            option = "--host" if name == "host" else name
            raise ValueError(
                f"{name} {host} can be reached by others, and nobody needs a key yet: make one with "
                f"`medassist keys create`, or serve this machine only ({option} 127.0.0.1)"
            )
