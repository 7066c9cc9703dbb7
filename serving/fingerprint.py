"""Does an engine compute what was trained? Compares it with the checkpoint's ``fingerprint.json``.

``modeling.fingerprint`` writes that file and describes it. Nothing here needs torch: checksums are read from disk, and
log-probabilities are asked of the engine over its ordinary completions route.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

# Largest difference of a log-probability, in nats. In float32 only the order of summation differs; the 16-bit formats
# round every activation to 8 or 11 bits.
TOLERANCE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
# Quantised weights are others than those that were trained, and single log-probabilities move far. A model that still
# works is off by less than this share of the mean log-probability.
QUANTISED_TOLERANCE = 0.1


class Mismatch(ValueError):
    """The checkpoint or the engine is not what the fingerprint says; the message names both and the difference."""


@dataclass(frozen=True)
class Report:
    """The largest and the mean difference found, in nats, over ``values`` log-probabilities."""

    worst: float
    mean: float
    values: int
    quantised: bool = False

    def __str__(self) -> str:
        if self.quantised:
            off = f"off by {self.mean:.2g} on average, {self.worst:.2g} at most"
            return f"quantised: {self.values} log-probabilities {off}"
        return f"{self.values} log-probabilities as trained, to {max(self.worst, 1e-7):.1g}"


def read(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint's fingerprint.

    Raises:
        Mismatch: there is none, or it is not one of version 1.
    """
    path = directory / "fingerprint.json"
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise Mismatch(
            f"{directory} has no fingerprint.json, so nothing shows that the engine computes what was trained. "
            f"`medassist import {directory} --out DIR` makes a directory that can be served, of files of others too"
        ) from None
    # A model without a tokenizer takes token ids alone.
    if "tokenizer.json" not in content["sha256"] and (directory / "tokenizer.json").exists():
        raise Mismatch(f"{directory}: tokenizer.json is not in fingerprint.json; remove it or record a new fingerprint")
    return content


def read_file(path: Path) -> dict[str, Any]:
    """Reads a fingerprint that lies apart from its checkpoint.

    Raises:
        Mismatch: it is damaged, or not one of version 1.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != 1:
            raise Mismatch(f"{path} has version {content['version']!r}; this program reads version 1")
        for probe in content["probes"]:
            _check_shape(probe)
        if not content["probes"]:
            raise KeyError("probes")
        if not any(name.endswith(".safetensors") for name in content["sha256"]):
            raise KeyError("the weights' checksum")
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise Mismatch(f"{path} is damaged: {e!r}") from e
    return content


def _check_shape(probe: dict[str, Any]) -> None:
    if len(probe["logprobs"]) != len(probe["token_ids"]) - 1:
        raise KeyError(f"{len(probe['logprobs'])} logprobs for {len(probe['token_ids'])} token_ids")
    if len(probe["greedy_logprobs"]) != len(probe["greedy_ids"]):
        raise KeyError(f"{len(probe['greedy_logprobs'])} greedy_logprobs for {len(probe['greedy_ids'])} greedy_ids")


def verify_files(directory: Path) -> None:
    """Compares the checksums of weights and tokenizer.

    Raises:
        Mismatch: a file differs, is missing, or is not in the fingerprint.
    """
    expected: dict[str, str] = read(directory)["sha256"]
    present = {path.name for path in directory.glob("*.safetensors")}
    if unknown := sorted(present - set(expected)):
        raise Mismatch(f"{directory}: {unknown[0]} is not in fingerprint.json; remove it or record a new fingerprint")
    for name, checksum in expected.items():
        path = directory / name
        if not path.exists():
            raise Mismatch(f"{directory}: {name} is missing, fingerprint.json has its checksum")
        with path.open("rb") as f:
            actual = hashlib.file_digest(f, "sha256").hexdigest()
        if actual != checksum:
            raise Mismatch(
                f"{directory}: {name} is not the file that was trained: its SHA-256 is {actual[:16]}..., "
                f"fingerprint.json says {checksum[:16]}... (damaged, or replaced without a new fingerprint)"
            )


async def verify_engine(
    directory: Path,
    model: str,
    dtype: str,
    session: aiohttp.ClientSession,
    url: str,
    *,
    quantised: bool = False,
    longest: int | None = None,
) -> Report:
    """Compares the engine's log-probabilities, of given tokens (prefill) and of its greedy answer (decode).

    Args:
        url: the engine's ``/v1/completions``.
        quantised: the engine's weights are not those that the fingerprint was computed with.
        longest: positions that the engine was started with; longer probes are left out. None: the model's own.

    Raises:
        Mismatch: a value is further off than ``TOLERANCE[dtype]``, or the greedy tokens differ in float32. Quantised:
            the mean difference is above ``QUANTISED_TOLERANCE`` of the mean log-probability.
        aiohttp.ClientError: the engine does not answer.
    """
    worst, where, total, magnitude, values = 0.0, "", 0.0, 0.0, 0
    for number, probe in enumerate(read(directory)["probes"], 1):
        ids, greedy = probe["token_ids"], probe["greedy_ids"]
        if longest and len(ids) + max(1, len(greedy)) > longest:
            continue
        # Quantised, the engine may choose other tokens than the trained model: it is given the trained model's.
        prompt, count = (ids + greedy, 1) if quantised and greedy else (ids, max(1, len(greedy)))
        if longest and len(prompt) + count > longest:
            prompt = prompt[:-1]
        choice = await _score(directory, number, model, prompt, count, session, url)
        computed = choice["logprobs"]["token_logprobs"]
        expected = probe["logprobs"] + probe["greedy_logprobs"]
        for at, (a, b) in enumerate(zip(computed[1:], expected, strict=False), 1):
            difference = abs(a - b)
            total, magnitude, values = total + difference, magnitude + abs(b), values + 1
            if not difference <= worst:  # also true of NaN
                worst = difference
                where = f"probe {number}, token {at}: trained {b:.6f}, served {a:.6f}"
        chosen = choice["token_ids"][: len(greedy)]
        if dtype == "float32" and not quantised and chosen != greedy:
            raise Mismatch(
                f"{directory}: the engine does not compute what was trained: after probe {number} the trained model "
                f"continues {greedy}, the engine {chosen}; log-probabilities are off by up to {worst:.3g}"
            )
    report = Report(worst, total / max(1, values), values, quantised)
    if quantised and not total <= QUANTISED_TOLERANCE * magnitude:
        raise Mismatch(
            f"{directory}: quantised, the engine computes something else than what was trained: log-probabilities are "
            f"off by {report.mean:.3g} on average, more than {QUANTISED_TOLERANCE:.0%} of their mean"
        )
    if not quantised and not worst <= TOLERANCE[dtype]:
        raise Mismatch(
            f"{directory}: the engine does not compute what was trained: log-probabilities are off by up to "
            f"{worst:.3g} ({where}), {TOLERANCE[dtype]:g} is allowed in {dtype}"
        )
    return report


async def verify_adapters(
    directory: Path, model: str, adapters: list[str], session: aiohttp.ClientSession, url: str
) -> None:
    """Checks that each adapter changes what the engine computes.

    Raises:
        Mismatch: it computes the same with the adapter as without: it has loaded the adapter and does not apply it.
    """
    if not adapters:
        return
    probes = read(directory)["probes"]
    ids = probes[min(1, len(probes) - 1)]["token_ids"]
    without = await _score(directory, 2, model, ids, 1, session, url)
    for name in adapters:
        scored = await _score(directory, 2, name, ids, 1, session, url)
        if scored["logprobs"]["token_logprobs"] == without["logprobs"]["token_logprobs"]:
            raise Mismatch(f"{directory}: the engine computes the same with the adapter {name} as without it")


async def _score(
    directory: Path, number: int, model: str, ids: list[int], tokens: int, session: aiohttp.ClientSession, url: str
) -> Any:
    request = scoring_request(model, ids, tokens)
    async with session.post(url, json=request) as response:
        answer = await response.json()
    if response.status != 200:
        raise Mismatch(f"{directory}: the engine cannot compute probe {number} of fingerprint.json: {answer}")
    return answer["choices"][0]


def scoring_request(model: str, ids: list[int], tokens: int) -> dict[str, Any]:
    """The body of a completions request for log-probabilities of ``ids``, and of ``tokens`` greedy ones after them."""
    # Ids in place of text: the model may have no tokenizer.
    return {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "seed": 0, "echo": True,
            "logprobs": 0, "ignore_eos": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True}  # fmt: skip
