"""One engine of one model: how to reach it, whether it can be used, and how much it has to do.

    starting -> ready -> down -> ready ...        refused: it does not have the model, or computes something else
                                                  draining: gets no new requests

Three sources tell: requests that were sent there (at once), looks at its health (every ``probes.interval``), and now
and then a canary. A replica that was gone and is back may be another process: what it serves and what it computes are
asked again before it gets requests.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence

import aiohttp
import yarl

from serving.gateway import canary
from serving.gateway.breaker import Breaker
from serving.gateway.canary import CanaryBaseline, Target, Verdict
from serving.gateway.metrics import Metrics
from serving.gateway.probes import Health, Status, StatusFile, describe, find_model, get, look
from serving.gateway.scraper import NOTHING, Scraper
from serving.gateway.settings import EngineAt, Model, Probes
from serving.gateway.trust import Trust
from serving.gateway.upstream import open_session, parse_address, request_headers

STATES = ("starting", "ready", "down", "refused", "draining")
MISSES = 2  # looks in a row that may find it only late before it counts as down
DOWN_INTERVAL = 0.25  # seconds between looks at a replica that is not ready
PATIENCE = 10.0  # seconds that a start waits for a busy engine to answer its first canary
RECHECK = 10.0  # seconds until an engine without the model is asked again
LONGEST_RETRY = 120  # seconds, of ``retry_after``
DRAIN_RETRY = 10  # the same, for a replica that is being replaced by hand


class Replica:
    """See the module.

    Attributes:
        name: label in metrics, of this model's replicas.
        model: the public name of its model.
        settings: where it is; replaced by :meth:`update`.
        session: HTTP client for it alone; there from :meth:`start` on.
        timeout: for its requests; pass it along, the session's own does not follow the settings.
        served_name: what the model is called there.
        max_model_len: positions of a request there; None: not told.
        state: one of ``STATES``.
        reason: why it is not ready.
        running, waiting, cache_usage: as it told last; 0 where it does not tell.
        foreign: requests there that are not this gateway's.
        outstanding: this gateway's requests there; counted by the scheduler.
        on_change: called when it may have become available, or no longer is, and when its load is known anew.
    """

    def __init__(
        self,
        name: str,
        model: str,
        at: EngineAt,
        settings: Model,
        probes: Probes,
        metrics: Metrics,
        baseline: CanaryBaseline,
        report: Callable[[str], None],
        on_change: Callable[[], None],
        traces: Sequence[aiohttp.TraceConfig] = (),
    ) -> None:
        """Raises ValueError when the key's environment variable is not set, or the URL is none."""
        self.name, self.model = name, model
        self.settings, self._model, self._probes = at, settings, probes
        self.baseline, self._report, self.on_change = baseline, report, on_change
        self.state, self.reason = "starting", ""
        self.served_name = at.served_name or model
        self.max_model_len: int | None = None
        self.running = self.waiting = self.foreign = self.outstanding = 0
        self.cache_usage, self.chunk_usage = 0.0, True  # the latter until it refuses to tell the usage with chunks
        self.session: aiohttp.ClientSession
        self._traces = traces
        self._socket, self._base = parse_address(at.url)
        self._urls: dict[str, yarl.URL] = {}
        self._who = f"{model}[{name}]"
        self.label = f"{self._who} {at.url if self._socket else self._base.with_user(None)}"
        self._headers = request_headers(at)
        self.timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeouts.connect)

        labels = (model, name)
        self._failures, self._canaries = metrics.replica_failures, metrics.canaries
        self._up_gauge = metrics.replica_up.labels(*labels)
        self._state_gauges = {state: metrics.replica_state.labels(*labels, state) for state in STATES}
        self._load_gauges = [
            gauge.labels(*labels) for gauge in (metrics.engine_running, metrics.engine_waiting, metrics.engine_cache)
        ]

        self._status_file = StatusFile(at.status_file) if at.status_file else None
        self._status = Status("ready")
        self._health_path = "/health"
        self._reachable = False  # healthy when last looked at, and no request failed to connect since
        self._known = False  # it has the model, as far as it was asked since it was last gone
        self._ask_models = False  # again, since the settings name others
        self._misfit = ""  # why it does not have the model
        self._reported = False  # that it is waited for
        self._reported_unsupported = False
        self._seen = False  # has been ready or refused before
        self._why = "not looked at yet"
        self._misses = 0
        self._breaker = Breaker()
        self._breaker_timer: asyncio.TimerHandle | None = None
        self._down_since: float | None = None
        self._last_outage: float | None = None
        self._scraper = Scraper()
        self._recheck_at = 0.0
        self._trust = Trust()
        self._canary: asyncio.Task[None] | None = None
        self._retired = False
        self._watcher: asyncio.Task[None] | None = None
        self._awake = asyncio.Event()
        self._judged = asyncio.Event()  # the first conclusion about it
        self._looked_at = self._lost_at = 0.0  # when it was last looked at, and when a connection last broke

    # For requests.

    def url(self, path: str) -> yarl.URL:
        """The URL of one of our routes, such as "/v1/completions"."""
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._base.with_path(self._base.path.rstrip("/") + path)
        return url

    def name_there(self, public: str) -> str:
        """What the model, or one of its adapters, is called there."""
        return self.served_name if public == self.model else public

    @property
    def available(self) -> bool:
        """Whether a request may be sent there now."""
        if self.state != "ready":
            return False
        return self._breaker.until is None or self._breaker.lets(_now(), self.outstanding)

    @property
    def retry_after(self) -> int:
        """Whole seconds after which it may be available."""
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds_left())))

    def _seconds_left(self) -> float:
        now = _now()
        elapsed = now - self._down_since if self._down_since is not None else 0.0
        if self._status.state != "ready" and self._status.ready_at is not None:
            if (left := self._status.ready_at - time.time()) > 0:
                return left
        elif self.state == "draining":
            return self._last_outage or DRAIN_RETRY
        elif self.state == "refused":
            return (self._trust.due_at if self._known else self._recheck_at) - now
        elif self.state == "ready":
            if self._status.start_seconds and self._lost_at > max(self._trust.answered_at, self._looked_at):
                return self._status.start_seconds
            return (self._breaker.until or now) - now
        elif self._status.start_seconds and elapsed < self._status.start_seconds and not self._trust.hangs:
            return self._status.start_seconds - elapsed  # it has just died, and is about to be started again
        if self._last_outage is not None and elapsed < self._last_outage:
            return self._last_outage - elapsed
        # Longer than ever before: the longer it has been gone, the longer it is likely to stay so.
        return max(self._probes.interval, elapsed / 2)

    def failed(self, reason: str) -> None:
        """A request found it failing.

        Args:
            reason: "connect", "timeout", "reset", "stall" or "5xx"; "500": the request may be at fault; "refused": it
                does not accept our key; "missing": it does not have the model or adapter; "busy": it takes no more at
                the moment, which counts nothing.
        """
        self._failures.labels(self.model, self.name, reason).inc()
        self._scraper.used = True
        self._awake.set()
        if reason == "busy":
            return
        if reason == "reset":
            self._lost_at = _now()
        if reason in ("refused", "missing"):
            self._ask_models = True
        pause = self._breaker.failed(_now(), self.outstanding, doubtful=reason == "500")
        if pause is not None:
            self._report(f"{self.label}: gets no requests for {pause:g} s after failures in a row ({reason})")
            if self._breaker_timer:
                self._breaker_timer.cancel()
            self._breaker_timer = asyncio.get_running_loop().call_later(pause, self.on_change)
            self._publish()
            self.on_change()
        if reason == "connect" and self._reachable:
            self._reachable, self._why = False, "requests cannot connect"
            self._trust.hurry(_now() + RECHECK)
            self._settle()

    def began(self) -> None:
        """The first byte of an answer that is not 5xx has come. What failed before counts until one is whole."""
        self._scraper.used = True
        self._trust.answered_at = _now()
        if self._breaker.until is not None:
            self._report(f"{self.label}: answers again")
            self._breaker.close()
            self._publish()
            self.on_change()

    def succeeded(self) -> None:
        """An answer is whole."""
        self.began()
        if self._breaker.failures or self._breaker.doubts:
            self._breaker.reset()

    def unanswered(self, seconds: float) -> None:
        """A client left after so many seconds without a byte."""
        self._trust.unanswered(seconds, _now())

    # Life.

    async def start(self) -> None:
        """Begins to watch it, and waits for a first conclusion, at most ``PATIENCE``."""
        self.session = open_session(self._socket, self._headers, self.timeout, self._traces)
        self._down_since = _now()
        self._publish()
        self._watcher = asyncio.create_task(self._watch())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._judged.wait()

    def retire(self) -> None:
        """It is removed from the settings; requests that it has may end."""
        self._retired = True
        self._withdraw()

    async def stop(self) -> None:
        """Ends the watching and closes its connections, whatever runs over them."""
        tasks = [task for task in (self._watcher, self._canary) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._breaker_timer:
            self._breaker_timer.cancel()
        for gauge in (self._up_gauge, *self._state_gauges.values(), *self._load_gauges):
            gauge.set(0)
        if self._watcher is not None:
            await self.session.close()

    def update(self, at: EngineAt, settings: Model, probes: Probes) -> None:
        """Takes new settings for the same URL.

        Raises:
            ValueError: the key's environment variable is not set; the old settings stay.
        """
        assert at.url == self.settings.url
        headers = request_headers(at)
        before, before_model, before_probes = self.settings, self._model, self._probes
        self.settings, self._model, self._probes, self._headers = at, settings, probes, headers
        self.timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeouts.connect)
        if self._watcher is not None:
            self.session.headers.clear()
            self.session.headers.update(headers)
        if at.status_file != before.status_file:
            self._status_file = StatusFile(at.status_file) if at.status_file else None
            self._status = Status("ready")
        if (at.served_name, settings.adapters) != (before.served_name, before_model.adapters):
            self._ask_models = True
        self._recheck_at = 0.0
        if at.draining and not before.draining:
            self._withdraw()  # what takes its place may compute something else on purpose
        if before.draining and not at.draining:
            self._trust.hurry(0.0)
        if settings.fingerprint != before_model.fingerprint or probes.canary_interval != before_probes.canary_interval:
            self._trust.hurry(0.0)
        self._settle()
        self._awake.set()

    # Watching.

    async def _watch(self) -> None:
        while True:
            self._awake.clear()
            self._looked_at = _now()
            try:
                await self._look()
            except Exception as e:
                # Whatever an engine answers, the watching must go on, or it would never come back.
                self._unreachable(f"cannot be watched ({type(e).__name__})", restarted=False)
            self._publish()
            await self._rest()

    async def _rest(self) -> None:
        """Until the next look is due: an interval, or less when there is news."""
        hurry = self.state in ("starting", "down") or self._misses > 0
        pause = min(DOWN_INTERVAL, self._probes.interval) if hurry else self._probes.interval
        due = self._looked_at + pause
        while (left := due - _now()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, DOWN_INTERVAL) if self._status_file else left):
                    await self._awake.wait()
            if self._awake.is_set() or (self._status_file and self._status_file.read() != self._status):
                # Many requests that fail at once are worth one look.
                due = min(due, self._looked_at + min(DOWN_INTERVAL, self._probes.interval))
                await asyncio.sleep(max(0.0, due - _now()))

    async def _look(self) -> None:
        if self._status_file:
            self._status = self._status_file.read()
            if self._status.state != "ready":
                self._unreachable(self._status.reason or self._status.state, restarted=True)
                return
        found = await self._ask_health()
        if not found.ok:
            self._misses += 1
            if found.certain or self._misses >= MISSES or not self._reachable:
                self._unreachable(found.reason, found.restarted)
            return
        self._misses = 0
        # Before anything slower: a passive failure while this runs counts.
        self._reachable = True
        if (self._ask_models or not self._known) and not await self._discover():
            self._settle()
            return
        self._check_canary()
        self._settle()
        await self._scrape()

    async def _ask_health(self) -> Health:
        status, found = await look(self.session, self.url(self._health_path), self._probes.timeout)
        if status in (404, 405) and self._health_path == "/health":
            self._health_path = "/v1/models"
            _, found = await look(self.session, self.url(self._health_path), self._probes.timeout)
        return found

    def _unreachable(self, why: str, restarted: bool) -> None:
        if self._reachable:
            self._failures.labels(self.model, self.name, "probe").inc()
        self._reachable, self._why = False, why
        if restarted:
            self._known = False
            self._trust.restarted()
            self._health_path = "/health"
            self._scraper.restarted()
            self._recheck_at = 0.0
            self._drop_canary()
            if self._status_file:
                self._withdraw()  # its weights may be new ones, which `serve` verifies
        else:
            self._trust.hurry(_now() + RECHECK)
        self.running = self.waiting = self.foreign = 0
        self.cache_usage = 0.0
        self._settle()

    async def _discover(self) -> bool:
        """Asks which models it has; whether it has been found to have ours, now or before."""
        if self._misfit and not self._ask_models and _now() < self._recheck_at:
            return False
        try:
            status, page = await get(self.session, self.url("/v1/models"), self._probes.timeout)
        except (aiohttp.ClientError, OSError) as e:
            self._why = f"its models cannot be asked for: {describe(e)}"
            return self._known
        self._ask_models, self._recheck_at, self._misfit = False, _now() + RECHECK, ""
        try:
            found = find_model(status, page, self.model, self.settings.served_name, self._model.adapters)
        except ValueError as e:
            self._misfit = str(e)
        else:
            self.served_name, self.max_model_len = found.served_name, found.max_model_len
        self._known = not self._misfit
        return self._known

    # Canaries.

    def _drop_canary(self) -> None:
        if self._canary:
            self._canary.cancel()
            self._canary = None

    def _withdraw(self) -> None:
        """What it computed no longer has to be what its model computes."""
        self._drop_canary()
        self.baseline.forget(self._who)

    def _check_canary(self) -> None:
        interval, trust = self._probes.canary_interval, self._trust
        if not interval:
            trust.switch_off()
            return
        if self._canary or self._retired or self.settings.draining:
            return
        if not trust.given and self._status_file and not trust.refusal:
            # `medassist serve` compares its engines with their fingerprints before it says that they are ready.
            trust.vouch(_now() + interval)
        elif trust.due(_now(), self.baseline.drops):
            if not trust.given:
                self._why = "waits for its canary"
            self._canary = asyncio.create_task(self._send_canary())

    async def _send_canary(self) -> None:
        target = Target(
            self._who,
            self.session,
            self.url("/v1/completions"),
            self.served_name,
            self.max_model_len,
            self._model.has_tokenizer,
        )
        trust = self._trust
        trust.asked(_now(), self.baseline.drops)
        try:
            found = await canary.check(target, self.baseline, self._model.fingerprint, trust.turn)
        except Exception as e:  # as in _watch
            found = Verdict("failed", f"canary: {type(e).__name__}")
        self._canary = None
        first = not trust.given
        verdict = trust.conclude(found, _now(), self._probes.canary_interval or math.inf)
        self._canaries.labels(self.model, self.name, verdict.outcome).inc()
        if verdict is not found and found.outcome == "unsupported":
            self._ask_models = True  # perhaps it has lost ours
        if verdict.outcome == "unsupported" and not self._reported_unsupported:
            self._reported_unsupported = True
            self._report(f"{self.label}: its answers cannot be checked ({verdict.reason})")
        if first and trust.given and not trust.refusal:
            self._breaker.reset()
            self._publish()
        self._settle()

    # Load.

    async def _scrape(self) -> None:
        interval, before = self._probes.interval, self.outstanding
        if not self._scraper.due(_now(), interval, bool(before or self.running or self.waiting)):
            return
        load = await self._scraper.ask(self.session, self.url("/metrics"), self._probes.timeout, interval)
        if load is None:
            return
        changed = load is not NOTHING or bool(self.running or self.waiting)
        self.running, self.waiting, self.cache_usage = load.running, load.waiting, load.cache_usage
        # Some of ours came or ended on the way: rather too little than too much counts as foreign.
        self.foreign = max(0, load.running + load.waiting - max(before, self.outstanding))
        if changed:
            self.on_change()

    # State.

    def _conclude(self) -> tuple[str, str]:
        """State and reason."""
        told = self._status
        gone = "down" if self._seen else "starting"
        if self.settings.draining:
            return "draining", "set in the settings"
        if told.state in ("draining", "stopped"):
            return "draining", told.reason or told.state
        if told.state == "refused":
            return "refused", told.reason
        if not self._reachable:
            return gone, self._why
        if self._trust.hangs:
            return gone, self._trust.hangs
        if self._misfit or self._trust.refusal:
            return "refused", self._misfit or self._trust.refusal
        if not self._known or not self._trust.given:
            return gone, self._why
        return "ready", ""

    def _settle(self) -> None:
        """Draws the conclusion from all that is known, and tells whoever wants to know."""
        before = self.state
        self.state, self.reason = self._conclude()
        pending = self._canary is not None and not self._trust.given
        if not pending:
            self._judged.set()
        if self.state == "starting" and not self._reported and not pending:
            self._reported = True
            self._report(f"{self.label}: starting: {self.reason}")
        if self.state == before:
            return
        now = _now()
        if self.state == "ready" and self._down_since is not None:
            if before in ("starting", "down"):
                self._last_outage = now - self._down_since
            self._down_since = None
        elif self.state != "ready" and self._down_since is None:
            self._down_since = now
        self._seen = self._seen or self.state in ("ready", "refused")
        self._report(f"{self.label}: {self.state}" + (f": {self.reason}" if self.reason else ""))
        self._publish()
        self.on_change()

    def _publish(self) -> None:
        self._up_gauge.set(self.state == "ready" and self._breaker.until is None)
        for state, gauge in self._state_gauges.items():
            gauge.set(state == self.state)
        for gauge, value in zip(self._load_gauges, (self.running, self.waiting, self.cache_usage), strict=True):
            gauge.set(value)


def _now() -> float:
    return asyncio.get_running_loop().time()
