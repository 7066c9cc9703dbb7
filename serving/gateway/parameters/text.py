"""Texts and token ids of prompts: what they may hold, how long they are, and where two of them part."""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from serving.gateway.errors import ApiError
from serving.gateway.parameters.refusals import wrong

# Lengths of prefixes: of a text in bytes, of token ids times 4, an average token's length.
CUTS = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
_NO_VOCABULARY = 2**31


def estimate(texts: Iterable[str]) -> int:
    """Tokens of texts, as a guess: a quarter of their bytes in UTF-8."""
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts) // 4


def prefixes_of_text(texts: Iterable[str]) -> tuple[int, ...]:
    """Hashes of growing prefixes; the same in every process, so that workers agree."""
    return _prefixes("\0".join(texts).encode())


def prefixes_of_ids(ids: list[int]) -> tuple[int, ...]:
    """The same of token ids, which must be checked before."""
    return _prefixes(array("I", ids[: CUTS[-1] // 4]).tobytes())


def _prefixes(data: bytes) -> tuple[int, ...]:
    if len(data) < CUTS[0]:
        return ()
    digest, start, hashes = blake2b(digest_size=8), 0, []
    for end in CUTS:
        if len(data) < end:
            break
        digest.update(memoryview(data)[start:end])
        hashes.append(int.from_bytes(digest.digest(), "little"))
        start = end
    return tuple(hashes)


def check_ids(ids: list[Any], vocab_size: int | None, param: str) -> None:
    """Refuses what is no token id of the model, which an engine does not survive in every case.

    Raises:
        ApiError: 400, invalid_token_id for numbers outside the vocabulary.
    """
    limit = vocab_size or _NO_VOCABULARY
    kinds = set(map(type, ids))
    if kinds == {int} and min(ids) >= 0 and max(ids) < limit:
        return
    for token in ids:
        # Integers beyond 64 bits are read as floats.
        whole = type(token) is int or (type(token) is float and token.is_integer())
        if not whole:
            raise wrong(param, "must be an array of token ids, which are integers", "invalid_type")
        if not 0 <= token < limit:
            of = f"the model's vocabulary of {limit}" if vocab_size else "any vocabulary"
            raise ApiError(400, f"token id {int(token)} is outside {of}", "invalid_token_id", param)
    raise wrong(param, "must be an array of token ids, which are integers", "invalid_type")  # 5.0


def prompts(value: Any, param: str, most: int, vocab_size: int | None) -> tuple[list[str], list[list[int]]]:
    """The texts, or the lists of ids, of a prompt in any of its four forms.

    Args:
        most: texts or lists of ids.

    Raises:
        ApiError: 400, it has none of the forms.
    """
    if isinstance(value, str):
        return [value], []
    if not isinstance(value, list) or not value:
        raise wrong(param, "must be a string, an array of token ids, or an array of either", "invalid_type")
    first = type(value[0])
    if first is int or first is float:
        check_ids(value, vocab_size, param)
        return [], [value]
    if len(value) > most:
        raise wrong(param, f"must have at most {most:,} entries, not {len(value):,}")
    if first is not list:
        if not all(type(text) is str for text in value):
            raise wrong(param, "must be a string, an array of token ids, or an array of either", "invalid_type")
        return value, []
    for i, ids in enumerate(value):
        if type(ids) is not list or not ids:
            raise wrong(f"{param}[{i}]", "must be an array of token ids, and not empty", "invalid_type")
        check_ids(ids, vocab_size, f"{param}[{i}]")
    return [], value
