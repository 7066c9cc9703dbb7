"""The gateway's settings: one YAML file, validated whole before any of it is used."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from serving.gateway.names import NAME_RULE, is_name, normal_url
from serving.gateway.operations import (
    DEFAULT_STORE,
    Admin,
    Audit,
    Cors,
    Log,
    Redis,
    Store,
    Tls,
    Tracing,
    default_home,
)
from serving.gateway.section import FilePath, Seconds, Section, Share
from serving.gateway.settings_file import Problems, explain, read
from serving.tenants.collector import read_headers, require_protocol


class Limits(Section):
    """What requests to a model may ask for.

    Attributes:
        max_tokens: longest answer in tokens; None: what the model can hold.
        n: answers to one request.
        logprobs: alternatives per token (``logprobs`` of completions, ``top_logprobs`` of chat).
        stop: stop sequences.
        messages: messages of a conversation.
        tools: functions a request may define; 0 refuses tools.
        schema_bytes, schema_depth: of a JSON schema (``response_format``, a tool's parameters), as compact JSON; all
            those of a request together may have 16 times the bytes.
        images: whether messages may hold images, as ``data:`` URLs only.
        control_tokens: whether messages may hold text that looks like a control token, such as ``<|im_start|>``.
        allow: fields of vLLM that are refused unless they are named here.
        deny: fields that are refused though they are otherwise known.
    """

    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(8, ge=1)
    logprobs: int = Field(20, ge=0)
    stop: int = Field(16, ge=0)
    messages: int = Field(2048, ge=1)
    tools: int = Field(64, ge=0)
    schema_bytes: int = Field(16_384, ge=0)
    schema_depth: int = Field(16, ge=1, le=250)
    images: bool = False
    control_tokens: bool = False
    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()

    @field_validator("allow")
    @classmethod
    def _check_allowed(cls, names: frozenset[str]) -> frozenset[str]:
        if names:
            from serving.gateway.parameters import NEVER  # imports this module

            if never := sorted(names & set(NEVER)):
                raise ValueError(f"may not hold {', '.join(never)}: that is never passed to an engine")
        return names

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if both := sorted(self.allow & self.deny):
            raise Problems([f"deny holds {both[0]}, and so does allow"])
        if self.deny:
            from serving.gateway.parameters import KNOWN  # imports this module

            # A misspelt name would deny nothing.
            if unknown := sorted(self.deny - KNOWN):
                raise Problems([f"deny holds {name}, which no route has{_similar(name, KNOWN)}" for name in unknown])
        return self


def _similar(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


class LatencyTarget(Section):
    """How soon an answer is worth having. With a target, the gateway finds by itself how many requests an engine can
    answer in time at once, and refuses at once those that would be late.

    Attributes:
        first_token: seconds from arrival to the first token of a stream.
        total: seconds from arrival to the end of the answer.
    """

    first_token: Seconds | None = None
    total: Seconds | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.first_token and self.total and self.total < self.first_token:
            raise Problems([f"total must be at least first_token ({self.first_token:g}), got {self.total:g}"])
        return self


class Timeouts(Section):
    """Seconds after which an engine is given up: to connect, until its first byte, between two bytes."""

    connect: Seconds = 2.0
    first_byte: Seconds = 300.0
    stall: Seconds = 60.0


class EngineAt(Section):
    """One replica: an OpenAI-compatible server.

    Attributes:
        url: its root, such as ``http://10.0.0.5:8000`` (a ``/v1`` at the end is dropped), or ``unix:/run/engine.sock``.
        served_name: the model's name there; None: found out from its ``/v1/models``.
        api_key_env: environment variable that holds the key to send; None: none is sent.
        weight: share of the work relative to the model's other replicas.
        draining: gets no new requests; set it before the server is restarted.
        status_file: written by ``medassist serve`` for its own engines.
    """

    url: str
    served_name: str | None = Field(None, min_length=1)
    api_key_env: str | None = None
    weight: Share = 1.0
    draining: bool = False
    status_file: FilePath | None = None

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return normal_url(url)

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("must be the name of an environment variable that holds the key, not the key")
        return name


class Model(Section):
    """A model, and the engines that serve it.

    Attributes:
        engines: replicas that run already.
        checkpoint: directory that ``medassist serve`` starts engines for, ``replicas`` of them.
        adapters: LoRA adapters of the engines, each a model of its own name.
        vocab_size: token ids from here on are refused; None: not known.
        has_tokenizer: False: the engines take and give token ids only.
        fingerprint: ``fingerprint.json`` that replicas must reproduce; None: replicas are compared with the first.
        max_concurrency: requests at one engine at once, at most.
        max_queue: requests that wait in the gateway, at most.
        max_prefill_tokens: prompt tokens sent to one engine that have had no answer yet, at most.
        queue_timeout: seconds that a request waits for an engine, at most.
        cache_salts: whether its engines get the tenants' salts; False for servers that refuse ``cache_salt``.
        chunk_usage: whether its engines are to tell the usage with every chunk of a stream, so that a stream which is
            left counts exactly; False: such a one counts by its chunks.
    """

    engines: tuple[EngineAt, ...] = ()
    checkpoint: FilePath | None = None
    replicas: int = Field(1, ge=1)
    adapters: tuple[str, ...] = ()
    vocab_size: int | None = Field(None, ge=1)
    has_tokenizer: bool = True
    fingerprint: FilePath | None = None
    limits: Limits = Limits()
    latency_target: LatencyTarget = LatencyTarget()
    max_concurrency: int = Field(256, ge=1)
    max_queue: int = Field(256, ge=0)
    max_prefill_tokens: int = Field(131_072, ge=1)
    queue_timeout: Seconds = 10.0
    cache_salts: bool = True
    chunk_usage: bool = True
    timeouts: Timeouts = Timeouts()

    @model_validator(mode="after")
    def _check_engines(self) -> Self:
        lines = []
        if not self.engines and not self.checkpoint:
            lines.append("engines must name at least one server (or checkpoint a directory, for medassist serve)")
        if self.replicas > 1 and not self.checkpoint:
            lines.append("replicas is for checkpoint: list each server of engines instead")
        first: dict[str, int] = {}
        for index, engine in enumerate(self.engines):
            if (earlier := first.setdefault(engine.url, index)) != index:
                lines.append(f"engines[{index}].url is the same server as engines[{earlier}].url")
        if lines:
            raise Problems(lines)
        return self


class Http(Section):
    """What connections may do.

    Attributes:
        max_body: bytes of a request's body.
        max_header: bytes of a request's head.
        header_timeout, body_timeout: seconds to receive the whole head, and the whole body.
        send_timeout: seconds that a client may leave what it is sent unread.
        keep_alive: seconds that an idle connection stays open.
        max_connections: of one worker.
        json_depth: nesting of a request's JSON.
    """

    max_body: int = Field(8 * 2**20, ge=1)
    max_header: int = Field(32 * 2**10, ge=1024)
    header_timeout: Seconds = 10.0
    body_timeout: Seconds = 30.0
    send_timeout: Seconds = 60.0
    keep_alive: Seconds = 75.0
    max_connections: int = Field(4096, ge=1)
    json_depth: int = Field(64, ge=1, le=250)


class Retries(Section):
    """How often a request that got no answer is sent to another replica.

    Attributes:
        attempts: tries of one request, the first included.
        budget: retries as a share of requests, beyond ten retries in ten seconds.
    """

    attempts: int = Field(3, ge=1)
    budget: float = Field(0.2, ge=0)


class Probes(Section):
    """How replicas are watched: seconds between looks at their health and metrics, and between canaries (0: none)."""

    interval: Seconds = 1.0
    timeout: Seconds = 2.0
    canary_interval: float = Field(60.0, ge=0)


Alias = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[dict[str, Share], Tag("<shares>")],
    Discriminator(lambda value: "<shares>" if isinstance(value, dict) else "<name>"),
]


class Settings(Section):
    """The whole file.

    Attributes:
        models: by the name that clients use.
        aliases: further names, each for a model, or for several with their shares: ``{new: 0.1, old: 0.9}``.
        host, port, workers: changed by a restart only.
        keep_alive_comments: seconds of silence after which a stream gets a comment, so that proxies keep it open.
        drain: seconds that running requests may take after SIGTERM.
        home: folder of the default database, of journals and of the audit log; None: ``MEDASSIST_HOME``, or
            ``~/.medassist``.
        cache_salts: whether prompts get their tenant's salt, so that no tenant can tell from a prefix cache what
            another has sent.
        store, redis, audit, tracing, log, tls, cors, admin: see their classes; changed by a restart only, but for
            ``cors``.
    """

    models: dict[str, Model]
    aliases: dict[str, Alias] = {}
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=256)
    http: Http = Http()
    retries: Retries = Retries()
    probes: Probes = Probes()
    keep_alive_comments: Seconds = 15.0
    drain: float = Field(30.0, ge=0)
    home: FilePath | None = None
    cache_salts: bool = True
    store: Store = Store()
    redis: Redis = Redis()
    audit: Audit = Audit()
    tracing: Tracing = Tracing()
    log: Log = Log()
    tls: Tls = Tls()
    cors: Cors = Cors()
    admin: Admin = Admin()

    @property
    def home_folder(self) -> Path:
        return self.home or default_home()

    @property
    def keeps_accounts(self) -> bool:
        """Whether there is a store: one is named, or ``medassist keys create`` has made the default one."""
        return self.store.named or (self.home_folder / DEFAULT_STORE).exists()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        lines = [] if self.models else ["models must hold at least one model"]
        names = dict.fromkeys(self.models, "a model")
        lines += [f"models.{name} {NAME_RULE}" for name in self.models if not is_name(name)]
        for model, settings in self.models.items():
            for index, adapter in enumerate(settings.adapters):
                key = f"models.{model}.adapters[{index}]"
                if not is_name(adapter):
                    lines.append(f"{key} {NAME_RULE}")
                elif adapter in names:
                    lines.append(f"{key} must have a name of its own: {adapter} is {names[adapter]} already")
                names.setdefault(adapter, f"an adapter of {model}")
        for alias, targets in self.aliases.items():
            if not is_name(alias):
                lines.append(f"aliases.{alias} {NAME_RULE}")
            if alias in names:
                lines.append(f"aliases.{alias} must have a name of its own: {alias} is {names[alias]} already")
            if not targets:
                lines.append(f"aliases.{alias} must name at least one model")
            for target in [targets] if isinstance(targets, str) else targets:
                if target in self.aliases and target not in names:
                    lines.append(f"aliases.{alias} names {target}, which is an alias: name the models themselves")
                elif target not in names:
                    lines.append(f"aliases.{alias} names {target}, which is not among models")
        hosts = {self.host, self.admin.host}
        if self.admin.port and self.admin.port == self.port and (len(hosts) == 1 or hosts & {"0.0.0.0", "::"}):
            lines.append("admin.port must be another one than port")
        if lines:
            raise Problems(lines)
        return self

    @classmethod
    def from_engines(cls, pairs: Sequence[str], **others: Any) -> Self:
        """Settings for running servers, each given as ``NAME=URL``; a name given twice is a model with two replicas.

        Args:
            others: further keys of the file, such as ``port``.

        Raises:
            ValueError: a pair is not valid; one line per problem.
        """
        models: dict[str, dict[str, list[dict[str, str]]]] = {}
        lines = []
        for pair in pairs:
            name, equals, url = pair.partition("=")
            try:
                if not equals or not is_name(name):
                    raise ValueError("must be NAME=URL, such as demo=http://10.0.0.5:8000")
                models.setdefault(name, {"engines": []})["engines"].append({"url": normal_url(url)})
            except ValueError as e:
                # A pair without a name may be a URL with a password.
                lines.append(f"--engine {name if equals and is_name(name) else ''}".strip() + f": {e}")
        if not lines:
            try:
                return cls.model_validate({"models": models, **others})
            except ValidationError as e:
                lines = [f"--engine: {line}" for line in explain(e, cls)]
        raise ValueError("\n".join(lines))

    def dump(self) -> str:
        """As JSON that ``load`` reads back to the same settings, in whatever folder it lies."""
        return self.model_dump_json(exclude_defaults=True)

    def require_remote(self) -> None:
        """Refuses models whose engines would have to be started.

        Raises:
            ValueError: there are such; one line each.
        """
        if local := [name for name, model in self.models.items() if model.checkpoint]:
            raise ValueError(
                "\n".join(
                    f"models.{name}.checkpoint needs an engine to be started, which only medassist serve does: "
                    "give engines that run"
                    for name in local
                )
            )


_RESTART_ONLY = ("host", "port", "workers", "home", "store", "redis", "audit", "tracing", "log", "tls", "admin")


def restart_only(old: Settings, new: Settings) -> list[str]:
    """Keys of the file that differ, and that a reload does not change."""
    return [name for name in _RESTART_ONLY if getattr(old, name) != getattr(new, name)]


def load(path: Path, *, local: bool = False, references: bool = True) -> Settings:
    """Reads and checks a file, and what it refers to: the variables of keys, and the fingerprints.

    Args:
        path: of YAML, or JSON. Paths in it are relative to its folder.
        local: whether engines can be started, for models that have a ``checkpoint``.
        references: whether to check what it refers to.

    Raises:
        ValueError: it is not valid; a line per problem names the file, the key and what it must be.
        OSError: it cannot be read.
    """
    text = read(path)
    try:
        # As JSON and strictly: true is no number, and "5" is none.
        settings = Settings.model_validate_json(text, strict=True, context={"folder": path.absolute().parent})
        if not local:
            settings.require_remote()
        if references and (lines := _check_references(settings)):
            raise Problems(lines)
    except ValidationError as e:
        raise ValueError("\n".join(f"{path}: {line}" for line in explain(e, Settings))) from None
    except ValueError as e:
        raise ValueError("\n".join(f"{path}: {line}" for line in str(e).splitlines())) from None
    return settings


def _check_references(settings: Settings) -> list[str]:
    lines = []
    for name, model in settings.models.items():
        if model.fingerprint:
            try:
                if not isinstance(json.loads(model.fingerprint.read_bytes()), dict):
                    raise ValueError
            except OSError as e:
                lines.append(f"models.{name}.fingerprint: {model.fingerprint} cannot be read ({e.strerror})")
            except (ValueError, RecursionError):
                lines.append(f"models.{name}.fingerprint: {model.fingerprint} is not a fingerprint.json")
        for index, engine in enumerate(model.engines):
            if engine.api_key_env:
                key = os.environ.get(engine.api_key_env, "")
                where = f"models.{name}.engines[{index}].api_key_env: the variable {engine.api_key_env}"
                if not key:
                    lines.append(f"{where} is not set")
                elif not re.fullmatch(r"[!-~]+", key):
                    lines.append(f"{where} may hold only what a header can: ASCII without spaces or line ends")
    try:
        settings.redis.resolve()
    except ValueError as e:
        lines.append(str(e))
    if settings.tracing.endpoint:
        try:
            require_protocol()
            read_headers(settings.tracing.headers_env)
        except ValueError as e:
            lines.append(f"tracing: {e}")
    return lines
