"""The models that are served: their names, replicas and schedulers, kept across reloads of the settings."""

import asyncio
import random
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from itertools import accumulate, count
from time import monotonic
from typing import Any

import aiohttp

from serving.gateway.accounts import Accounts
from serving.gateway.canary import CanaryBaseline
from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.parameters import Checked
from serving.gateway.relay import Request
from serving.gateway.replica import Replica
from serving.gateway.retries import RetryBudget
from serving.gateway.scheduler import Scheduler
from serving.gateway.settings import EngineAt, Model, Settings
from serving.gateway.upstream import request_headers
from serving.tenants.key import NOBODY, Key

TICK = 0.5  # seconds between looks at the running requests
LONGEST_TOKEN = 32  # bytes of text to a token, on average, that no tokenizer reaches


def report(text: str) -> None:
    """One line for the operator."""
    print(f"medassist: {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Served:
    """A model: what is set for it, who serves it, and who lets requests through."""

    name: str
    settings: Model
    replicas: list[Replica]
    scheduler: Scheduler
    baseline: CanaryBaseline

    @property
    def available(self) -> bool:
        return any(replica.available for replica in self.replicas)

    def settings_for(self, key: Key) -> Model:
        """The model's settings with the key's own limit of an answer's length."""
        most = key.limits.max_tokens
        limits = self.settings.limits
        if most is None or (limits.max_tokens is not None and limits.max_tokens <= most):
            return self.settings
        return self.settings.model_copy(update={"limits": limits.model_copy(update={"max_tokens": most})})

    def refuse_too_long(self, checked: Checked) -> None:
        """Refuses what cannot fit the model by far, so that it takes no place in the queue; the engine counts exactly.

        Raises:
            ApiError: 400.
        """
        longest = max((replica.max_model_len or 0 for replica in self.replicas), default=0)
        several = isinstance(checked.body.get("prompt"), list)
        # Estimates are a quarter of the bytes.
        if longest and not several and 4 * checked.prompt_tokens > LONGEST_TOKEN * longest:
            what = f"This model's maximum context length is {longest} tokens. Please shorten the prompt."
            raise ApiError(400, what, "context_length_exceeded")

    @property
    def state(self) -> str:
        """The best of its replicas' states."""
        order = ("ready", "starting", "draining", "down", "refused")
        return min((replica.state for replica in self.replicas), key=order.index, default="down")


class Pool:
    """All models of the gateway, and the requests that are being answered.

    Args:
        workers: processes that share the load; each has its share of every limit.
        accounts: None: nobody needs a key.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, workers: int = 1, accounts: Accounts | None = None
    ) -> None:
        self.accounts = accounts or Accounts(settings, metrics, workers)
        self.settings, self.metrics = settings, metrics
        self.models: dict[str, Served] = {}
        self.requests: set[Request] = set()
        self.bodies = 0  # bytes that they sent
        self.retries = RetryBudget(settings.retries, 1 / workers)
        self._share = 1 / workers
        self._names: dict[str, str] = {}  # of models and adapters -> the model
        self._splits: dict[str, tuple[list[str], list[float]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._leaving: set[Replica] = set()  # removed from the settings; they finish the requests that they have
        self._coming: set[Replica] = set()  # of new settings; they are met before these are used

    async def start(self) -> None:
        """Meets all replicas; those that do not answer now are looked at again and again."""
        self.spawn(self._tick())
        await self.apply(self.settings)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        staying = {replica for served in self.models.values() for replica in served.replicas}
        await asyncio.gather(*(replica.stop() for replica in staying | self._leaving | self._coming))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets work run beside the requests until it ends or the pool stops."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self, seconds: float) -> None:
        """Waits until no request is being answered, but not for longer."""
        deadline = monotonic() + seconds
        while self.requests and monotonic() < deadline:  # noqa: ASYNC110  the same
            await asyncio.sleep(0.02)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = monotonic()
            for request in tuple(self.requests):
                request.tick(now)

    # Names.

    def resolve(self, name: object, key: Key = NOBODY) -> tuple[Served, str]:
        """The model for a name, and the name of the model or adapter that is meant by it.

        Raises:
            ApiError: no such model, or none that the key may use.
        """
        if not isinstance(name, str) or not name:
            raise ApiError(400, "the request needs a field 'model' with a model's name", "missing_model", "model")
        split = self._splits.get(name)
        if split is None and name not in self._names:
            known = ", ".join([name for name in (*self._names, *self._splits) if self._may_use(key, name)][:20])
            raise ApiError(404, f"there is no model {name[:100]!r}; there are: {known}", "model_not_found", "model")
        if key.models is not None and not self._may_use(key, name):
            raise ApiError(403, f"this key may not use the model {name[:100]!r}", "model_not_allowed", "model")
        if split is not None:
            name = random.choices(split[0], cum_weights=split[1])[0]
        return self.models[self._names[name]], name

    def _may_use(self, key: Key, name: str) -> bool:
        """Whether a key may use a name: it has it, or all that an alias stands for."""
        if key.models is None or name in key.models:
            return True
        return name in self._splits and key.models.issuperset(self._splits[name][0])

    def cards(self, created: int, key: Key = NOBODY) -> list[dict[str, object]]:
        """Models, adapters and aliases as ``/v1/models`` lists them: those that the key may use."""
        cards: list[dict[str, object]] = []
        for name, base in self._names.items():
            if not self._may_use(key, name):
                continue
            card = {"id": name, "object": "model", "created": created, "owned_by": "medassist"}
            lengths = [r.max_model_len for r in self.models[base].replicas if r.max_model_len]
            card |= {"root": base, "parent": base if base != name else None}
            cards.append(card | ({"max_model_len": min(lengths)} if lengths else {}))
        for alias, (targets, _) in self._splits.items():
            if not self._may_use(key, alias):
                continue
            card = {"id": alias, "object": "model", "created": created, "owned_by": "medassist"}
            cards.append(card | {"root": targets[0], "parent": None})
        return cards

    # Settings.

    async def apply(self, settings: Settings) -> None:
        """Takes new settings into use. Replicas that stay keep what is known of them; requests that run go on.

        Raises:
            ValueError: an engine's URL or key cannot be used; nothing has changed then.
        """
        models = {name: self._prepare(name, model, settings) for name, model in settings.models.items()}
        # From here on nothing is refused.
        old = {replica for served in self.models.values() for replica in served.replicas}
        kept = {replica for served in models.values() for replica in served.replicas}
        for replica in old - kept:
            replica.retire()
            self._leaving.add(replica)
        self._coming = kept - old
        if old:  # which answer until it is known whether the new ones can
            await self._meet_all()
        for name, served in models.items():
            if known := self.models.get(name):
                places = dict(zip(served.replicas, served.settings.engines, strict=True))
                for replica in set(known.replicas) & set(served.replicas):
                    replica.update(places[replica], served.settings, settings.probes)
                known.settings, known.replicas = served.settings, served.replicas
                known.scheduler.update(served.settings, served.replicas)
                models[name] = known
        for name, served in self.models.items():
            if name not in models:
                served.scheduler.update(served.settings, [])
        self.settings, self.models = settings, models
        self.retries.settings = settings.retries
        self._names = {name: name for name in models}
        self._names |= {adapter: name for name, served in models.items() for adapter in served.settings.adapters}
        self._splits = {
            alias: ([target], [1.0]) if isinstance(target, str) else (list(target), list(accumulate(target.values())))
            for alias, target in settings.aliases.items()
        }
        for replica in old - kept:
            self.spawn(self._part(replica))
        await self._meet_all()

    async def _meet_all(self) -> None:
        """Starts those that are to come."""
        await asyncio.gather(*(replica.start() for replica in self._coming))
        self._coming = set()

    def _prepare(self, name: str, model: Model, settings: Settings) -> Served:
        """What is to become of a model, with replicas that are not started or updated yet."""
        known = self.models.get(name)
        stay = {replica.settings.url: replica for replica in known.replicas} if known else {}
        # A replica that still has requests keeps its label, and its metrics, for itself.
        taken = {replica.name for replica in (*stay.values(), *self._leaving) if replica.model == name}
        labels = (label for label in map(str, count()) if label not in taken)
        baseline = known.baseline if known else CanaryBaseline()
        replicas = []
        for at in model.engines:
            if replica := stay.get(at.url):
                request_headers(at)  # whether they can be had
            else:
                replica = self._meet(name, next(labels), at, model, settings, baseline)
            replicas.append(replica)
        scheduler = known.scheduler if known else Scheduler(name, model, replicas, self.metrics, self._share)
        return Served(name, model, replicas, scheduler, baseline)

    def _meet(
        self, name: str, label: str, at: EngineAt, model: Model, settings: Settings, baseline: CanaryBaseline
    ) -> Replica:
        def changed() -> None:
            if served := self.models.get(name):
                served.scheduler.wake()

        return Replica(label, name, at, model, settings.probes, self.metrics, baseline, report, changed, (_phases(),))

    async def _part(self, replica: Replica) -> None:
        """Leaves a replica when the last of its requests is done."""
        while replica.outstanding:  # noqa: ASYNC110  so rare that an event would cost more
            await asyncio.sleep(0.1)
        await replica.stop()
        self._leaving.discard(replica)


def _phases() -> aiohttp.TraceConfig:
    """Lets a request know that its connection is being made."""
    trace = aiohttp.TraceConfig()

    async def begins(session: object, context: Any, parameters: object) -> None:
        if isinstance(request := context.trace_request_ctx, Request):
            request.phase = "connecting"

    async def ends(session: object, context: Any, parameters: object) -> None:
        if isinstance(request := context.trace_request_ctx, Request):
            request.phase = "waiting"

    trace.on_connection_create_start.append(begins)
    trace.on_connection_create_end.append(ends)
    return trace
