"""``medassist gateway``: checks everything, takes the port, and becomes the gateway's supervisor."""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from clients.installation import printable

if TYPE_CHECKING:
    from serving.gateway.settings import Settings
    from serving.tenants.keeper_config import Standing

_FOLDER = "medassist-gateway-"
_EPILOG = (
    "Examples: medassist gateway --engine demo=http://10.0.0.5:8000 --engine demo=http://10.0.0.6:8000 --port 8080; "
    "medassist gateway --config gateway.yaml --workers 4"
)


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command(epilog=_EPILOG)(gateway)


def gateway(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings, as YAML or JSON; read again when it changes.")
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME=URL",
            help="A running OpenAI-compatible server, http://, https:// or unix:/PATH, and the model that it serves; "
            "repeatable, and a NAME given twice has two replicas.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; the file's, or 127.0.0.1, if not given.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on, 0 for a free one; the file's, or 8000, if not given."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes that serve; the file's, or 1, if not given.")
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="With --engine: time for running requests to finish at the end; 30 if not given."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the settings are valid, and what is.")
    ] = False,
) -> None:
    """Serves the models of running servers behind one OpenAI-compatible API until Ctrl-C or SIGTERM."""
    try:
        settings = _settings(config, engines or [], host=host, port=port, workers=workers, drain=drain_seconds)
        from serving.tenants.keeper_config import examine

        standing = examine(settings)
        if settings.tls.certificate:
            from serving.gateway.tls import create_context

            create_context(settings.tls)
    except ValueError as e:
        for line in str(e).splitlines():
            typer.secho(f"medassist: {printable(line)}", err=True, fg="red")
        raise typer.Exit(2) from None
    if check:
        for line in (*_summary(settings), *_standing(settings, standing)):
            print(printable(line))
        for line in _doubts(settings):
            typer.secho(f"medassist: warning: {printable(line)}", err=True, fg="yellow")
        return
    _become_supervisor(config, settings, standing)


def _settings(config: Path | None, engines: list[str], **flags: Any) -> "Settings":
    from serving.gateway.settings import Settings, load

    given = {key: value for key, value in flags.items() if value is not None}
    if (config is None) == (not engines):
        raise ValueError("say which models to serve: either --config FILE, or --engine NAME=URL (repeatable)")
    if config is None:
        return Settings.from_engines(engines, **given)
    if "drain" in given:
        raise ValueError(f"--drain-seconds is for --engine: set drain in {config}")
    return load(config).model_copy(update=given)


def _summary(settings: "Settings") -> Iterator[str]:
    yield f"valid: {settings.host}:{settings.port}, {settings.workers} worker{'s' * (settings.workers > 1)}"
    for name, model in settings.models.items():
        servers = ", ".join(engine.url + " (draining)" * engine.draining for engine in model.engines)
        yield f"model {name}: {servers}"
        for adapter in model.adapters:
            yield f"model {adapter}: an adapter of {name}"
    for alias, targets in settings.aliases.items():
        shares = {targets: 1.0} if isinstance(targets, str) else targets
        total = sum(shares.values())
        yield f"alias {alias}: " + ", ".join(f"{target} {100 * share / total:.4g}%" for target, share in shares.items())


def _standing(settings: "Settings", standing: "Standing") -> Iterator[str]:
    """What is on of all that operators need."""
    yield f"keys: {'needed' if standing.keys else 'none yet, so this machine only is served, without one'}"
    if standing.store:
        yield f"usage: in the store ({standing.store}), by way of journals in {settings.home_folder / 'journal'}"
        what = "requests, keys" if settings.audit.requests else "keys"
        yield f"audit log: {what}, settings and captures, in {settings.home_folder / 'audit'}"
        yield f"limits: counted {'in Redis' if settings.redis.resolve() else 'by each worker'}"
    else:
        yield "usage: not kept, since there is no store (`medassist keys create` makes one)"
    if settings.tracing.endpoint:
        yield f"traces: {100 * settings.tracing.sample:g}% of the requests"
    if settings.log.requests:
        yield f"request log: {settings.log.file or 'standard output'}"
    if settings.admin.port is not None:
        yield f"metrics and admin: {settings.admin.host}:{settings.admin.port}"


def _doubts(settings: "Settings") -> Iterator[str]:
    """What is valid and may yet not be meant, or not work now."""
    file = settings.log.file
    if file and not settings.log.requests:
        yield "log.file has no effect without log.requests: true"
    elif file and not file.parent.is_dir():
        yield f"log.file: there is no folder {file.parent}, so nothing will be logged until there is"
    if settings.admin.port is None and "host" in settings.admin.model_fields_set:
        yield "admin.host has no effect without admin.port"
    if url := settings.redis.resolve():
        import redis

        seconds = max(settings.redis.timeout, 1.0)
        where = "redis.url_env" if settings.redis.url_env else "redis.url"
        try:
            with redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds) as client:
                client.ping()
        except redis.AuthenticationError:
            yield f"{where}: Redis refuses the user or the password"
        except (redis.RedisError, OSError) as e:  # whose text could repeat the password
            yield f"{where}: Redis does not answer ({type(e).__name__}); without it each worker counts for itself"
        except (ValueError, TypeError):
            yield f"{where}: it has an option that Redis' client does not know"


def _become_supervisor(config: Path | None, settings: "Settings", standing: "Standing") -> NoReturn:
    """Replaces this process, so that what validation has imported takes no memory while the gateway runs."""
    from serving.gateway.listener import listen
    from serving.gateway.workers import MALLOC

    listener = listen(settings.host, settings.port)
    listener.set_inheritable(True)
    arguments = ["--fd", str(listener.fileno()), "--workers", str(settings.workers)]
    if settings.admin.port is not None:
        admin = listen(settings.admin.host, settings.admin.port, "admin.port")
        admin.set_inheritable(True)
        arguments += ["--admin-fd", str(admin.fileno())]
    if settings.tls.certificate:
        arguments.append("--tls")
    folder: Path | None = None
    if not {"", os.getcwd()} & set(sys.path):
        # `python -m` would look for modules in the working directory first, which can be anybody's.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        from serving.tenants.keeper_config import open_to, write_config

        folder = _make_folder()
        write_config(settings, folder / "accounts", config)
        arguments += ["--accounts", str(folder / "accounts")]
        arguments += ["--remove", str(folder)]  # the supervisor does, when it ends
        if not standing.keys:
            typer.secho(f"medassist: {open_to(listener)}", err=True)
        if config is None:
            config = folder / "gateway.json"
            config.write_text(settings.dump())
        command = [sys.executable, "-m", "serving.gateway.supervisor", "--config", str(config.absolute()), *arguments]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, {**MALLOC, **os.environ})
    except BaseException:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _make_folder() -> Path:
    """A private folder, locked for as long as this process lives. Those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    return folder
