"""A worker's part: a chunk of raw documents becomes cleaned, hashed, tokenised ones."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from training.prepare.deduplication import BANDS, band_keys
from training.prepare.encoding import Encoder
from training.prepare.jats import prose
from training.prepare.sources import Chunk

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Settings:
    """What decides what a chunk becomes.

    Attributes:
        shares: of documents in train, validation and test.
        minimum: characters below which a document is left out.
        jats: columns hold JATS XML.
        deduplicate: whether band keys are wanted.
    """

    shares: tuple[float, float, float]
    minimum: int
    jats: bool
    deduplicate: bool


@dataclass
class Encoded:
    """A chunk's documents, in their order. D documents, T tokens in all.

    Attributes:
        counts: documents read, malformed and too short.
        splits: (D,) uint8, places in ``SPLITS``.
        keys: (D, 1 or 1 + BANDS) uint64 below 2**60: of the whole text, then of its bands.
        lengths: (D,) int64, tokens, the one after the document included.
        sizes: (D,) int64, bytes of the text.
        tokens: (T,) uint16 or uint32.
    """

    counts: dict[str, int]
    splits: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    damage: list[str] = field(default_factory=list)


_encoder: Encoder  # of this worker process
_settings: Settings


def start_worker(encoder: Path, settings: Settings) -> None:
    """Prepares a worker process."""
    global _encoder, _settings
    end_with_parent()
    _encoder, _settings = Encoder(encoder), settings


def end_with_parent() -> None:
    """Has this process end when the one that started it does, however that ends, and not by Ctrl-C before."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=wait, daemon=True).start()


def encode_chunk(chunk: Chunk) -> Encoded:
    """Cleans, hashes and tokenises a chunk with the worker's tokenizer and settings."""
    return encode(chunk, _encoder, _settings)


def encode(chunk: Chunk, encoder: Encoder, settings: Settings) -> Encoded:
    """Cleans, hashes and tokenises a chunk."""
    counts = {"read": 0, "malformed": 0, "too_short": 0, "too_long": chunk.too_long}
    texts: list[str] = []
    raw: list[bytes] = []
    for text in documents(chunk, settings.jats):
        counts["read"] += 1
        if text is None:
            counts["malformed"] += 1
        elif len(text) < settings.minimum:
            counts["too_short"] += 1
        else:
            try:
                raw.append(text.encode())
            except UnicodeEncodeError:  # half of a surrogate pair is no text
                counts["malformed"] += 1
                continue
            texts.append(text)
    counts["read"] += chunk.too_long
    digests = np.frombuffer(b"".join(hashlib.sha256(text).digest()[:16] for text in raw), "<u8").reshape(-1, 2)
    end = np.array([encoder.eos], encoder.dtype)
    parts: list[np.ndarray] = []
    lengths = np.empty(len(texts), np.int64)
    for index, ids in enumerate(encoder.encode(texts)):
        parts += (ids, end)
        lengths[index] = len(ids) + 1
    tokens = np.concatenate(parts) if parts else np.empty(0, encoder.dtype)
    keys = digests[:, 1:] >> np.uint64(4)
    if settings.deduplicate:
        keys = np.concatenate([keys, band_keys(tokens, lengths, keys[:, 0])], axis=1)
        assert keys.shape[1] == 1 + BANDS
    sizes = np.array([len(text) for text in raw], np.int64)
    return Encoded(counts, split_of(digests[:, 0], settings.shares), keys, lengths, sizes, tokens, chunk.damage)


def split_of(hashes: np.ndarray, shares: tuple[float, float, float]) -> np.ndarray:
    """The split of each text by 64 bits of its hash: equal texts are never in two."""
    places = (hashes >> np.uint64(11)).astype(np.float64) / 2**53
    train, validation, _ = shares
    return (places >= train).astype(np.uint8) + (places >= train + validation).astype(np.uint8)


def documents(chunk: Chunk, jats: bool = False) -> Iterator[str | None]:
    """The cleaned text of each document of a chunk; None for what cannot be read."""
    if chunk.kind == "articles":
        yield from map(_prose, chunk.payload)
    elif chunk.kind == "texts":
        for content in chunk.payload:
            try:
                yield tidy(content.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield None
    elif chunk.kind in ("lines", "tables"):
        for columns in _rows(chunk):
            text = None if columns is None else _joined(columns)
            yield text if text is None else _prose(text.encode(errors="replace")) if jats else tidy(text)
    else:
        assert chunk.kind == "damage"


def _rows(chunk: Chunk) -> Iterator[list[Any] | None]:
    if chunk.kind == "tables":
        for table in chunk.payload:
            columns = table if isinstance(table, dict) else table.to_pydict()
            yield from map(list, zip(*(columns[name] for name in chunk.columns), strict=True))
        return
    for block in chunk.payload:
        for line in block.split(b"\n"):
            if not line or line.isspace():
                continue
            try:
                row = orjson.loads(line)
            except ValueError:
                row = None
            yield [row.get(name) for name in chunk.columns] if isinstance(row, dict) else None


def _joined(columns: list[Any]) -> str | None:
    """The columns' texts, a blank line between them; None if one is neither text, texts nor empty."""
    parts: list[str] = []
    for value in columns:
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            parts += value
        elif value is not None:
            return None
    return "\n\n".join(parts)


def _prose(article: bytes) -> str | None:
    try:
        return prose(article)
    except ValueError:
        return None


def tidy(text: str) -> str:
    """Plain text with one kind of line end, no null characters and no more than one empty line in a row."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\x00" in text:
        text = text.replace("\x00", "")
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()
