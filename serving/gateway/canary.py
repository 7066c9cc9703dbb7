"""Does a replica compute what its model should? One short request, compared with numbers that are known.

With a fingerprint (:mod:`serving.fingerprint`) these are the trained model's. Without one they are those that the first
replica gave: what it computes is believed, and every replica must go on computing it. A replica that is up and answers
garbage is found so; nothing is logged of what it answers.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yarl

from serving import fingerprint
from serving.gateway.probes import describe, read

TIMEOUT = 30.0  # seconds; the engine may be busy
# Between replicas: mean difference of a log-probability, in nats. Other hardware, kernels and batches stay far below.
AGREEMENT = 0.5
# Any model can tell how likely these are.
PROMPT = "The patient has had a fever and a dry cough for three days."
PROMPT_IDS = (1, 2, 3, 5, 8, 13, 21, 34)

_UNSUPPORTED = (400, 404, 405, 422, 501)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a canary found.

    Attributes:
        outcome: "ok"; "deviates": it computes something else; "unsupported": it cannot be asked; "failed": it was asked
            and gave no answer, which says nothing of its numbers.
        reason: why it is not "ok".
        doubtful: that it deviates is not sure before it is found again.
        late: it gave no answer in time.
    """

    outcome: str
    reason: str = ""
    doubtful: bool = False
    late: bool = False


@dataclass(slots=True)
class CanaryBaseline:
    """What the replicas of one model are compared with; they share it.

    Attributes:
        numbers: the first replica's log-probabilities; None until there are some.
        source: who gave them.
        agreed: labels of replicas that gave them or computed the same.
        drops: how often numbers were forgotten.
    """

    numbers: list[float] | None = None
    source: str = ""
    agreed: set[str] = field(default_factory=set)
    drops: int = 0
    _file: Path | None = None
    _version: int = 0
    _probes: list[dict[str, Any]] = field(default_factory=list)

    def forget(self, label: str) -> None:
        """A replica is gone. With the last of those that agreed the numbers go: the next may be another model's."""
        self.agreed.discard(label)
        if self.numbers is not None and not self.agreed:
            self.numbers, self.source = None, ""
            self.drops += 1

    def probes(self, path: Path) -> list[dict[str, Any]]:
        """A fingerprint's probes, read again when the file changes; kept when it goes away later.

        Raises:
            fingerprint.Mismatch: it is damaged.
            OSError: it cannot be read.
        """
        try:
            version = path.stat().st_mtime_ns
        except OSError:
            if path == self._file:
                return self._probes
            raise
        if path != self._file or version != self._version:
            self._probes = fingerprint.read_file(path)["probes"]
            self._file, self._version = path, version
        return self._probes


@dataclass(frozen=True, slots=True)
class Target:
    """A replica as a canary sees it: who it is, where its completions are, and what its model is called there."""

    label: str
    session: aiohttp.ClientSession
    url: yarl.URL
    served_name: str
    max_model_len: int | None = None
    has_tokenizer: bool = True


async def check(target: Target, baseline: CanaryBaseline, path: Path | None, turn: int) -> Verdict:
    """Sends one canary. Without a fingerprint or numbers, the first answer of several makes these.

    Args:
        path: the model's fingerprint, if it has one.
        turn: counts a replica's canaries; each takes the fingerprint's next probe.
    """
    compare: Callable[[Any], Verdict]
    if path is not None:
        try:
            probes = baseline.probes(path)
        except fingerprint.Mismatch as e:
            return Verdict("deviates", str(e))
        except OSError as e:
            return Verdict("deviates", f"the fingerprint {path} cannot be read: {e.strerror}")
        fitting = [probe for probe in probes if _fits(probe, target.max_model_len)]
        if not fitting:
            return Verdict("unsupported", f"no probe of {path} fits into its {target.max_model_len} positions")
        probe = fitting[turn % len(fitting)]
        count = max(1, len(probe["greedy_ids"]))
        request = fingerprint.scoring_request(target.served_name, probe["token_ids"], count)

        def compare(choice: Any) -> Verdict:
            return compare_with_fingerprint(choice, probe)
    else:
        prompt: str | list[int] = PROMPT if target.has_tokenizer else list(PROMPT_IDS)
        request = {"model": target.served_name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True,
                   "logprobs": 1}  # fmt: skip

        def compare(choice: Any) -> Verdict:
            return compare_with_baseline(choice, baseline, target.label)

    try:
        async with asyncio.timeout(TIMEOUT):
            async with target.session.post(target.url, json=request, allow_redirects=False) as response:
                body = await read(response)
    except (aiohttp.ClientError, OSError) as e:
        return Verdict("failed", f"canary: {describe(e)}", late=isinstance(e, TimeoutError))
    known = path is not None or baseline.numbers is not None
    return _judge(response.status, body, known, compare)


def _fits(probe: dict[str, Any], longest: int | None) -> bool:
    if not probe["logprobs"] and not probe["greedy_logprobs"]:
        return False  # nothing to compare
    return longest is None or len(probe["token_ids"]) + max(1, len(probe["greedy_ids"])) <= longest


def _judge(status: int, body: bytes, known: bool, compare: Callable[[Any], Verdict]) -> Verdict:
    if status in _UNSUPPORTED:
        return Verdict("unsupported", f"canary: answers {status}")
    if status == 500 and known:
        # So does vLLM when its log-probabilities are no numbers. Where nothing is known yet, the server may be one that
        # cannot tell log-probabilities at all.
        reason = "cannot compute log-probabilities that it should (it answers 500)"
        return Verdict("deviates", reason, doubtful=True)
    if status != 200:
        return Verdict("failed", f"canary: answers {status}")
    choice: Any = None
    with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError):
        choice = orjson.loads(body)["choices"][0]
    if not isinstance(choice, dict):
        return Verdict("deviates", "its answer to the canary is no completion")
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
        return Verdict("unsupported", "canary: tells no log-probabilities")
    return compare(choice)


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """The values, if all of them are finite numbers."""
    if all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return [float(value) for value in values]
    return None


def compare_with_fingerprint(choice: Any, probe: dict[str, Any]) -> Verdict:
    """Compares a completion's log-probabilities with a probe's, of its tokens and of the greedy ones after them.

    Of the greedy tokens, those behind the first other choice are left out: another context gives other numbers, and a
    16-bit engine may choose otherwise where two tokens are about as likely.
    """
    greedy = probe["greedy_ids"]
    chosen = choice.get("token_ids")
    if not isinstance(chosen, list):
        return Verdict("unsupported", "canary: does not tell which tokens it chose")
    equal = next((at for at, (a, b) in enumerate(zip(chosen, greedy, strict=False)) if a != b), len(greedy))
    expected = probe["logprobs"] + probe["greedy_logprobs"][: equal + 1]
    # The first token has nothing before it, and so no log-probability.
    told = choice["logprobs"]["token_logprobs"][1 : 1 + len(expected)]
    computed = _numbers(told)
    if computed is None or len(computed) < len(expected):
        return Verdict("deviates", "its log-probabilities are not all numbers, or some are missing")
    worst = max((abs(a - b) for a, b in zip(computed, expected, strict=True)), default=0.0)
    # The engine's format is not known; this is the roughest of those that are not quantised. For quantised engines no
    # fingerprint is set: their weights are others.
    allowed = fingerprint.TOLERANCE["bfloat16"]
    if worst > allowed:
        return Verdict("deviates", f"log-probabilities are off by up to {worst:.2g}; {allowed:g} is allowed")
    return Verdict("ok")


def compare_with_baseline(choice: Any, baseline: CanaryBaseline, label: str) -> Verdict:
    """Compares a completion's log-probabilities with the model's first ones, or makes them these.

    The token that the engine chose is left out: two may be about as likely.
    """
    told = choice["logprobs"]["token_logprobs"]
    if len(told) < 3 or told[0] is not None:
        return Verdict("unsupported", "canary: tells no log-probabilities of the prompt")
    computed = _numbers(told[1:])
    if computed is None:
        return Verdict("deviates", "its log-probabilities are not all numbers")
    computed.pop()
    if baseline.numbers is None:
        baseline.numbers, baseline.source = computed, label
        baseline.agreed = {label}
        return Verdict("ok")
    who = "formerly" if baseline.source == label else f"by {baseline.source}"
    advice = "if the model was replaced on purpose, drain the replicas that have the old one, or restart the gateway"
    # One more or less: whether the token that ends an answer is told differs.
    if abs(len(computed) - len(baseline.numbers)) > 1:
        return Verdict("deviates", f"it splits text into other tokens than were computed {who} ({advice})")
    differences = [abs(a - b) for a, b in zip(computed, baseline.numbers, strict=False)]
    mean = sum(differences) / len(differences)
    if mean > AGREEMENT:
        reason = f"log-probabilities are {mean:.2g} off those computed {who} on average; {AGREEMENT:g} is allowed"
        return Verdict("deviates", f"{reason} ({advice})")
    baseline.agreed.add(label)
    return Verdict("ok")
