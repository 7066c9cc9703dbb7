"""Settings of what operators need: the store of keys and usage, limits across gateways, audit, traces, TLS, admin."""

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from serving.gateway.section import FilePath, Section
from serving.gateway.settings_file import Problems
from serving.tenants.collector import traces_url
from serving.tenants.redis_url import check_redis
from serving.tenants.store_url import URL_VARIABLE, refuse_password, sqlite_path

HOME = "MEDASSIST_HOME"  # environment variable
DEFAULT_STORE = "medassist.db"  # in home


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable that holds it")
    return name


Variable = Annotated[str, AfterValidator(_check_variable)]


def default_home() -> Path:
    """``MEDASSIST_HOME``, or ``~/.medassist``."""
    return Path(os.environ.get(HOME) or "~/.medassist").expanduser().absolute()


class _Located(Section):
    """Something at an address, which may hold a password: then it is in a variable, and not in the file."""

    url: str | None = None
    url_env: Variable | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.url and self.url_env:
            raise Problems(["url and url_env exclude each other"])
        return self

    def _find(self, name: str) -> str | None:
        """The URL that is given. Raises ValueError where its variable is not set."""
        if self.url_env:
            url = os.environ.get(self.url_env, "")
            if not url:
                raise ValueError(f"{name}.url_env: the variable {self.url_env} is not set")
            return url
        return self.url


class Store(_Located):
    """The database of keys and usage.

    Attributes:
        url: ``postgresql://USER@HOST/NAME`` or ``sqlite:///PATH``; no password (libpq reads ``PGPASSWORD`` and
            ``~/.pgpass``). None: that in ``MEDASSIST_STORE_URL``, or SQLite in ``home``.
        url_env: environment variable that holds the URL, a password included.
    """

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is None:
            return None
        refuse_password(url)
        folder, path = (info.context or {}).get("folder"), sqlite_path(url)
        if path and folder:  # relative to the settings file, as all paths in it
            return f"sqlite:///{folder / Path(url.removeprefix('sqlite:///')).expanduser()}"
        return url

    @property
    def named(self) -> bool:
        """Whether somebody has said where it is, here or in ``MEDASSIST_STORE_URL``."""
        return bool(self.url or self.url_env or os.environ.get(URL_VARIABLE))

    def resolve(self, home: Path) -> str:
        """The URL. Raises ValueError where its variable is not set."""
        return self._find("store") or os.environ.get(URL_VARIABLE) or f"sqlite:///{home / DEFAULT_STORE}"


class Redis(_Located):
    """Counters that several gateways share; without it each worker counts for itself.

    Attributes:
        url: ``redis://HOST:PORT/DB``, ``rediss://`` or ``unix://``; no password.
        url_env: environment variable that holds the URL, a password included.
        prefix: of the names of all that is kept there.
        timeout: seconds after which Redis counts as gone.
    """

    prefix: str = Field("medassist", min_length=1, pattern=r"^[A-Za-z0-9_:-]+$")
    timeout: float = Field(0.25, gt=0, le=10)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_redis(url, secret=False)
        return url

    def resolve(self) -> str | None:
        """The URL; None: there is none. Raises ValueError where its variable is not set, or holds no such URL."""
        url = self._find("redis")
        if url and self.url_env:
            try:
                check_redis(url, secret=True)
            except ValueError as e:
                raise ValueError(f"redis.url_env: what the variable {self.url_env} holds {e}") from None
        return url


class Audit(Section):
    """The audit log, in ``home/audit``.

    Attributes:
        requests: whether each request gets a line; keys, settings and captures always do.
        retention_days: after which a day's file is removed; six years by default.
    """

    requests: bool = True
    retention_days: int = Field(2192, ge=1)


def _check_endpoint(endpoint: str) -> str:
    traces_url(endpoint)
    return endpoint


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]


class Tracing(Section):
    """OpenTelemetry.

    Attributes:
        endpoint: of a collector that takes OTLP over HTTP, such as ``http://127.0.0.1:4318``; None: no traces.
        headers_env: environment variable with further headers, ``name=value,name=value``.
        sample: share of the requests that are traced, where the client does not decide it.
    """

    endpoint: Endpoint | None = None
    headers_env: Variable | None = None
    sample: float = Field(1.0, ge=0, le=1)


class Log(Section):
    """The request log: a line of JSON for each request.

    Attributes:
        requests: whether there is one.
        file: that it is appended to; None: standard output.
    """

    requests: bool = False
    file: FilePath | None = None


class Tls(Section):
    """Certificate chain and private key, as PEM files; read again when they change.

    Attributes:
        client_ca: certificates of those who may sign clients' certificates; None: clients need none.
    """

    certificate: FilePath | None = None
    key: FilePath | None = None
    client_ca: FilePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise Problems(["certificate and key go together"])
        if self.client_ca and not self.certificate:
            raise Problems(["client_ca needs certificate and key"])
        return self


def _check_origin(origin: str) -> str:
    if not re.fullmatch(r"https?://[^/\s*@?#]+", origin):
        raise ValueError("must be SCHEME://HOST[:PORT] without a path; * is not allowed")
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]


class Cors(Section):
    """Web pages of other origins that may use the API.

    Attributes:
        origins: such as ``https://app.example.org``; none by default.
    """

    origins: tuple[Origin, ...] = ()


class Admin(Section):
    """A listener of their own for ``/metrics`` and ``/admin``.

    Attributes:
        port: None: they are on the main one, for keys with the scope.
    """

    host: str = Field("127.0.0.1", min_length=1)
    port: int | None = Field(None, ge=0, le=65535)
