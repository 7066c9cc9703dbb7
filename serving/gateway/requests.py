"""What is checked of a request before an engine sees it: token ids, and text where a model has no tokenizer.

vLLM checks the rest. An id outside the vocabulary it does not catch in every case, and then its engine dies.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from serving.gateway.errors import ApiError

# Fields of a completion request that need a tokenizer, and what works without.
_TEXT_FIELDS = {
    "stop": "stop_token_ids",
    "bad_words": "logit_bias",
    "suffix": None,
    "response_format": None,
    "structured_outputs": None,
    "use_beam_search": None,
}


class Target(Protocol):
    """What the checks need to know of an engine."""

    vocab_size: int
    has_tokenizer: bool


def parse(body: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        ApiError: not JSON, or not an object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise ApiError(400, f"the request is not valid JSON: {e}", "invalid_json") from None
    if not isinstance(request, dict):
        raise ApiError(400, "the request must be a JSON object", "invalid_json")
    return request


def prepare(body: bytes, request: Mapping[str, Any], model: str, target: Target) -> bytes:
    """The body that the engine gets: the same bytes, but for a model without a tokenizer, whose answers are ids.

    Raises:
        ApiError: a token id that the model lacks, or text for a model without a tokenizer.
    """
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        _check_ids(prompt, target.vocab_size)
    if target.has_tokenizer:
        return body
    why = f"the model {model!r} has no tokenizer"
    if "messages" in request or "prompt" not in request:
        raise ApiError(400, f"{why} and no chat: send token ids to /v1/completions", "no_tokenizer", "messages")
    if not isinstance(prompt, list) or any(isinstance(part, str) for part in prompt):
        raise ApiError(400, f"{why}: the prompt must be a list of token ids", "no_tokenizer", "prompt")
    for field, instead in _TEXT_FIELDS.items():
        if request.get(field):
            raise ApiError(
                400, f"{why}: {field} needs one" + (f"; use {instead}" if instead else ""), "no_tokenizer", field
            )
    # An answer of text would be empty; log-probabilities name tokens by id.
    return orjson.dumps({**request, "return_token_ids": True, "return_tokens_as_token_ids": True})


def _check_ids(prompt: list[Any], vocab_size: int) -> None:
    for part in prompt:
        ids = part if isinstance(part, list) else (part,)
        for token in ids:
            # Integers beyond 64 bits are read as floats.
            if isinstance(token, int | float) and not 0 <= token < vocab_size:
                raise ApiError(
                    400, f"token id {int(token)} is outside the model's vocabulary of {vocab_size}", "invalid_token_id",
                    "prompt",
                )  # fmt: skip
