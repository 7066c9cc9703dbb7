"""What a request has used, when it ends: the tokens, the record, the counters of its key."""

import time
from typing import TYPE_CHECKING

from prometheus_client import Counter

from serving.gateway.metrics import Metrics
from serving.tenants.key import Key
from serving.tenants.record import Record

if TYPE_CHECKING:
    from serving.gateway.relay import Request

MOST_KEYS = 1000  # label values of one worker; further keys are counted together
OTHERS = "other"
_UNCOUNTED = "/tokenize"  # generates nothing, and costs no tokens
_EMBEDDINGS = "/v1/embeddings"  # has no tokens of an answer
_AT_ENGINE = frozenset(("waiting", "streaming", "ending"))
_GIVEN_UP = frozenset((499, 504))  # statuses of requests that an engine may have worked on all the same


def tokens_used(request: "Request", status: int) -> tuple[int, int, bool]:
    """Tokens of prompts and of answers, and whether they are a guess.

    What the engine has said counts. A request that it was asked and that has had no answer (its client has left, or
    its time was over) counts with its prompt, as estimated; one that no engine has taken counts nothing.
    """
    usage = request.usage
    usage.close()
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if prompt is not None and completion is not None:
        return prompt, completion, False
    route = request.route
    if route == _UNCOUNTED:
        return 0, 0, False
    answered = status == 200 or request.first_token >= 0
    if not answered and not (request.phase in _AT_ENGINE and status in _GIVEN_UP):
        return prompt or 0, completion or 0, False
    if prompt is None:
        prompt, known = request.prompt_tokens, False
    else:
        known = True
    if route == _EMBEDDINGS:
        return prompt, 0, not known
    return prompt, usage.events if completion is None else completion, True


def record_of(request: "Request", status: int, code: str, seconds: float, used: tuple[int, int, bool]) -> Record:
    """The record of a request that ends now, after so many seconds."""
    key, trace = request.key, request.trace
    prompt_tokens, completion_tokens, estimated = used
    return Record(
        time=time.time(),
        request_id=request.id.decode(),
        key=key.id,
        tenant=key.tenant,
        route=request.route,
        model=request.model,
        status=status,
        code=code,
        phase=request.phase,
        stream=request.stream,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        estimated=estimated,
        seconds=seconds,
        queued=request.queued,
        upstream=request.upstream_until(seconds),
        first_token=request.first_token,
        replica=request.replica,
        attempts=request.attempts,
        trace_id=trace.trace_id if trace else "",
        span_id=trace.span_id if trace else "",
        parent_id=trace.parent_id if trace else "",
        captured=request.recorder is not None,
    )


class KeyCounters:
    """Requests and tokens by key, as metrics. Labels are hashed ids, a bounded number of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._of: dict[str, _Counters] = {}
        self._others = _Counters(metrics, OTHERS)

    def count(self, key: Key, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        counters = self._of.get(key.id)
        if counters is None:
            if len(self._of) < MOST_KEYS:
                counters = self._of[key.id] = _Counters(self._metrics, key.hashed_id)
            else:
                counters = self._others
        counters.count(status, prompt_tokens, completion_tokens)


class _Counters:
    """Of one label value, each made when it is needed."""

    __slots__ = ("_completion", "_label", "_metrics", "_prompt", "_requests")

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._metrics, self._label = metrics, label
        self._requests: dict[int, Counter] = {}
        self._prompt: Counter | None = None
        self._completion: Counter | None = None

    def count(self, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        kind = status // 100
        requests = self._requests.get(kind)
        if requests is None:
            requests = self._requests[kind] = self._metrics.key_requests.labels(self._label, f"{kind}xx")
        requests.inc()
        if prompt_tokens or completion_tokens:
            if self._prompt is None or self._completion is None:
                tokens = self._metrics.key_tokens
                self._prompt, self._completion = (tokens.labels(self._label, k) for k in ("prompt", "completion"))
            self._prompt.inc(prompt_tokens)
            self._completion.inc(completion_tokens)
