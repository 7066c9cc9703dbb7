"""The arithmetic of the throughput benchmark, and its report. Nothing here sends or measures anything.

DEFINITIONS below says what each figure is; the Markdown report repeats it.
"""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import orjson

ENGINE, GATEWAY = "engine", "gateway"

DEFINITIONS = """\
- Round: a fixed number of streamed chat completions sent to one target, in a closed loop: a new request starts when
  one ends. `engine` is vLLM's server over its Unix socket; `gateway` is the same engine through the gateway, over TCP
  on loopback. Two neighbouring rounds, one of each target, are a pair; the order in the pairs alternates.
- tokens/s: completion tokens as counted by the engine (`usage.completion_tokens`), over the wall time from the round's
  first request to its last byte.
- TTFT: from sending a request to the read that brought the first non-empty `content`.
- TPOT: from that read to the last read of the stream, divided by the completion tokens less one.
- Chunk: one `data:` event of a stream; the opening, the usage and the `[DONE]` event count too.
- Percentiles are nearest-rank over the requests of a round; medians are over the rounds of a target, whose errors
  are summed.
- CPU seconds: user + system time of the gateway (without the engine, even where the engine is its child), of the
  engine and all its children, and of the benchmark's own client, from before to after the round. The operating system
  counts the first two in ticks, mostly of 10 ms.
- Ratio: tokens/s of the gateway over tokens/s of the engine. "Of medians" compares the median rounds; "of totals" all
  tokens over all seconds; "pairs" the two rounds of each pair."""

_CONTENT = re.compile(rb'"content":\s*"[^"]')


@dataclass(frozen=True)
class Stream:
    """One complete answer: ``chunks`` (events) and ``tokens`` counted, ``ttft`` and ``tpot`` in seconds."""

    chunks: int
    tokens: int
    ttft: float
    tpot: float


@dataclass(frozen=True)
class Round:
    """One round: wall ``seconds``, requests sent, how many failed for which reason, and sums over those that did not.

    ``ttft_*`` and ``tpot_*`` are in seconds, ``*_cpu`` in CPU seconds.
    """

    target: str
    seconds: float
    requests: int
    failures: dict[str, int]
    tokens: int
    chunks: int
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    gateway_cpu: float
    engine_cpu: float
    client_cpu: float

    @property
    def errors(self) -> int:
        return sum(self.failures.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Summary:
    """The headline. ``*_per_*`` are CPU milliseconds of the gateway over its own rounds."""

    engine_tokens_per_second: float
    gateway_tokens_per_second: float
    ratio_of_medians: float
    ratio_of_totals: float
    pair_ratios: list[float]
    gateway_cpu_ms_per_stream: float
    gateway_cpu_ms_per_chunk: float
    client_cores: float
    errors: int


@dataclass(frozen=True)
class Result:
    """A whole run. ``environment`` and ``settings`` are printed as they are, in their order."""

    environment: dict[str, str]
    settings: dict[str, Any]
    rounds: list[Round]
    summary: Summary

    def to_dict(self) -> dict[str, Any]:
        rounds = [asdict(r) | {"tokens_per_second": r.tokens_per_second} for r in self.rounds]
        return {
            "environment": self.environment,
            "settings": self.settings,
            "summary": asdict(self.summary),
            "rounds": rounds,
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least ``percent`` % of the values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no percentile of no values")
    return sorted(values)[max(math.ceil(percent * len(values) / 100), 1) - 1]


def read_stream(reads: Sequence[bytes], times: Sequence[float], sent: float, max_tokens: int) -> Stream:
    """Measures one answer from the bytes as they were read.

    Args:
        reads: the body, cut wherever the network cut it.
        times: seconds, when each read returned.
        sent: seconds, on the same clock, when the request was sent.
        max_tokens: what the answer must be long, as it was asked to ignore the end-of-text token.

    Raises:
        ValueError: the stream is not a whole answer of that length; the message says what is missing.
    """
    # With the newline before it every event starts with "\ndata:", which JSON text cannot contain.
    body = b"\n" + b"".join(reads)
    before, *last = body.rsplit(b"\ndata:", 2)
    if len(last) < 2 or _line(last[1]) != b"[DONE]":
        raise ValueError("the stream ended before [DONE]")
    event = orjson.loads(_line(last[0]))
    if "error" in event:
        raise ValueError(f"error in the stream: {_message(event)}")
    if not event.get("usage"):
        raise ValueError("no usage before [DONE]: stream_options.include_usage was ignored")
    tokens = event["usage"]["completion_tokens"]
    if tokens != max_tokens:
        raise ValueError(
            f"{tokens} tokens instead of {max_tokens}: either ignore_eos did not reach the engine, "
            "or the model's context is too short for --max-tokens"
        )
    content = _CONTENT.search(before)
    if not content:
        raise ValueError("no event with content")
    ends = list(accumulate(map(len, reads)))
    # The match lies one byte later in `body` than in what was read, so its last byte is `end() - 2` there.
    first = times[bisect_right(ends, content.end() - 2)]
    return Stream(body.count(b"\ndata:"), tokens, first - sent, (times[-1] - first) / (tokens - 1))


def _line(event: bytes) -> bytes:
    """The first line of an event: comments (keep-alives) may follow it."""
    return event.partition(b"\n")[0].strip()


def _message(event: dict[str, Any]) -> str:
    error = event["error"]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]


def make_round(target: str, answers: Sequence[Stream | str], seconds: float, **cpu: float) -> Round:
    """Sums up a round; an answer that is a string failed for that reason. ``cpu``: the ``*_cpu`` of :class:`Round`.

    Raises:
        RuntimeError: every request failed, so that there is nothing to sum up.
    """
    streams = [a for a in answers if isinstance(a, Stream)]
    failures = dict(Counter(a for a in answers if isinstance(a, str)))
    if not streams:
        raise RuntimeError(f"all {len(answers)} requests to the {target} failed: {reasons(failures)}")
    return Round(
        target=target,
        seconds=seconds,
        requests=len(answers),
        failures=failures,
        tokens=sum(s.tokens for s in streams),
        chunks=sum(s.chunks for s in streams),
        ttft_p50=percentile([s.ttft for s in streams], 50),
        ttft_p99=percentile([s.ttft for s in streams], 99),
        tpot_p50=percentile([s.tpot for s in streams], 50),
        **cpu,
    )


def summarize(rounds: Sequence[Round]) -> Summary:
    """The headline of whole pairs of neighbouring rounds, each pair with one round of either target."""
    engine = [r for r in rounds if r.target == ENGINE]
    gateway = [r for r in rounds if r.target == GATEWAY]
    pairs = zip(engine, gateway, strict=True)
    medians = [median(r.tokens_per_second for r in of) for of in (engine, gateway)]
    totals = [sum(r.tokens for r in of) / sum(r.seconds for r in of) for of in (engine, gateway)]
    cpu_ms = 1e3 * sum(r.gateway_cpu for r in gateway)
    return Summary(
        engine_tokens_per_second=medians[0],
        gateway_tokens_per_second=medians[1],
        ratio_of_medians=medians[1] / medians[0],
        ratio_of_totals=totals[1] / totals[0],
        pair_ratios=[b.tokens_per_second / a.tokens_per_second for a, b in pairs],
        gateway_cpu_ms_per_stream=cpu_ms / sum(r.requests - r.errors for r in gateway),
        gateway_cpu_ms_per_chunk=cpu_ms / sum(r.chunks for r in gateway),
        client_cores=max(r.client_cpu / r.seconds for r in rounds),
        errors=sum(r.errors for r in rounds),
    )


def reasons(failures: dict[str, int]) -> str:
    """The most frequent reasons, as one line."""
    return "; ".join(f"{count} x {reason}" for reason, count in Counter(failures).most_common(5))


def table(rounds: Sequence[Round]) -> str:
    """An aligned Markdown table, a line for each round and one of medians for each target."""
    head = ["round", "target", "tokens/s", "wall s", "requests", "errors"]
    lines = [[*head, "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "gateway CPU s", "engine CPU s", "client CPU s"]]
    lines += [[str(number), r.target, *_cells([r])] for number, r in enumerate(rounds, 1)]
    lines += [["median", target, *_cells([r for r in rounds if r.target == target])] for target in (ENGINE, GATEWAY)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cells(rounds: Sequence[Round]) -> list[str]:
    def middle(name: str, digits: int, scale: float = 1) -> str:
        return f"{scale * median(getattr(r, name) for r in rounds):.{digits}f}"

    return [
        middle("tokens_per_second", 1),
        middle("seconds", 2),
        middle("requests", 0),
        str(sum(r.errors for r in rounds)),
        middle("ttft_p50", 1, 1e3),
        middle("ttft_p99", 1, 1e3),
        middle("tpot_p50", 2, 1e3),
        middle("gateway_cpu", 2),
        middle("engine_cpu", 2),
        middle("client_cpu", 2),
    ]


def headline(result: Result) -> str:
    s = result.summary
    return "\n".join(
        [
            f"gateway / engine, tokens/s: {s.ratio_of_medians:.3f} of medians, {s.ratio_of_totals:.3f} of totals",
            f"pairs: {', '.join(f'{ratio:.3f}' for ratio in s.pair_ratios)}",
            f"gateway CPU: {s.gateway_cpu_ms_per_stream:.2f} ms per stream, "
            f"{s.gateway_cpu_ms_per_chunk:.4f} ms per chunk",
        ]
    )


def reading(result: Result) -> str:
    """One paragraph that says no more than the figures of this run do."""
    s, low, high = result.summary, min(result.summary.pair_ratios), max(result.summary.pair_ratios)
    ttft = {t: median(r.ttft_p50 for r in result.rounds if r.target == t) * 1e3 for t in (ENGINE, GATEWAY)}
    text = (
        f"Through the gateway clients received {s.gateway_tokens_per_second:.0f} tokens/s, straight from the engine "
        f"{s.engine_tokens_per_second:.0f} (median rounds): {100 * s.ratio_of_medians:.1f} %. The pairs lie between "
        f"{100 * low:.1f} % and {100 * high:.1f} %"
    )
    text += (
        ", on both sides of 100 %: this run does not resolve a difference. "
        if low <= 1 <= high
        else f", all {'below' if high < 1 else 'above'} 100 %. "
    )
    text += (
        f"A stream cost the gateway {s.gateway_cpu_ms_per_stream:.2f} ms of CPU, "
        f"{1e3 * s.gateway_cpu_ms_per_chunk:.1f} µs per chunk. The median TTFT was {ttft[ENGINE]:.0f} ms at the engine "
        f"and {ttft[GATEWAY]:.0f} ms through the gateway. The client used at most {s.client_cores:.2f} of a core."
    )
    if s.client_cores > 0.7:
        text += " That is so much that the client may have limited the throughput; lower --concurrency."
    if s.errors:
        text = f"**{s.errors} failed requests, so these figures are not a result.** " + text
    return text


def markdown(result: Result) -> str:
    """The report, every figure of which was measured in this run."""
    facts = [f"- {name}: {value}" for name, value in result.environment.items()]
    settings = [f"- {name}: {value}" for name, value in result.settings.items()]
    failures = [f"- round {n}: {reasons(r.failures)}" for n, r in enumerate(result.rounds, 1) if r.failures]
    sections = [
        "# What the gateway costs in throughput",
        headline(result).replace("\n", "  \n"),
        reading(result),
        table(result.rounds),
        *(["## Failed requests", "\n".join(failures)] if failures else []),
        "## Where and how",
        "\n".join(facts),
        "Settings:",
        "\n".join(settings),
        "## Definitions",
        DEFINITIONS,
    ]
    return "\n\n".join(sections) + "\n"
