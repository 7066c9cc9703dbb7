"""Token shards: tokenised documents in one memory-mapped file each.

A shard is a header, the tokens of all documents one after the other, and the offset at which each document starts:

    magic 8 | version u32 | bytes per token u32 | tokens u64 | documents u64 | tokenizer sha256 32 | tokens | offsets

Numbers are little-endian. Tokens are uint16 when the vocabulary allows it, else uint32; offsets are uint64, one more
than there are documents. Reading maps the file: it copies nothing and takes no memory of its own.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MEDTOKEN"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ32s")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies of up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def tokenizer_hash(path: Path) -> bytes:
    """SHA-256 of a ``tokenizer.json``: shards made with another tokenizer are refused."""
    return hashlib.sha256(path.read_bytes()).digest()


def write_shard(path: Path, documents: Iterable[list[int]], vocab_size: int, tokenizer_sha256: bytes) -> None:
    """Writes one shard, atomically.

    Raises:
        ValueError: a token id that the vocabulary does not have.
    """
    dtype = token_dtype(vocab_size)
    offsets = [0]
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as f:
        f.write(bytes(_HEADER.size))
        for ids in documents:
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(f"token ids {min(ids)}..{max(ids)} do not fit a vocabulary of {vocab_size}")
            f.write(np.asarray(ids, dtype=dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
        f.write(np.asarray(offsets, dtype="<u8").tobytes())
        f.seek(0)
        f.write(_HEADER.pack(MAGIC, VERSION, dtype.itemsize, offsets[-1], len(offsets) - 1, tokenizer_sha256))
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)


class Shard:
    """A shard opened for reading.

    Attributes:
        tokens: all tokens, ``(tokens,)`` uint16 or uint32, memory-mapped.
        offsets: ``(documents + 1,)`` uint64, memory-mapped.

    Raises:
        ValueError: not a shard, or made with another tokenizer.
    """

    def __init__(self, path: Path, tokenizer_sha256: bytes | None = None) -> None:
        with path.open("rb") as f:
            head = f.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:8] != MAGIC:
            raise ValueError(f"{path} is not a token shard")
        _, version, width, tokens, documents, made_with = _HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path} is a shard of version {version}; this program reads version {VERSION}")
        if tokenizer_sha256 is not None and made_with != tokenizer_sha256:
            raise ValueError(f"{path} was made with another tokenizer: delete the folder {path.parent} to remake it")
        self.tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=_HEADER.size, shape=(tokens,))
        self.offsets = np.memmap(
            path, dtype="<u8", mode="r", offset=_HEADER.size + tokens * width, shape=(documents + 1,)
        )


_encode: Callable[[Any], list[int]]  # of this worker process


def _start_worker(make_encoder: Callable[[Path], Callable[[Any], list[int]]], tokenizer_dir: Path) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _encode = make_encoder(tokenizer_dir)


def _tokenize_part(path: Path, documents: list[Any], vocab_size: int, sha256: bytes) -> int:
    encoded = [_encode(document) for document in documents]
    write_shard(path, encoded, vocab_size, sha256)
    return sum(len(ids) for ids in encoded)


def tokenize(
    documents: Iterator[Any],
    out: Path,
    tokenizer_dir: Path,
    make_encoder: Callable[[Path], Callable[[Any], list[int]]],
    vocab_size: int,
    documents_per_shard: int = 20_000,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda documents: None,
) -> dict[str, int]:
    """Tokenises documents in parallel into ``out/00000.shard`` and so on; the same files for any number of workers.

    Args:
        documents: anything ``make_encoder``'s result encodes; read as needed, at most ``2 * workers`` shards ahead.
        out: folder of the shards; ``manifest.json`` is written last, so a folder without one is incomplete.
        tokenizer_dir: folder that holds ``tokenizer.json``.
        make_encoder: makes, in each worker, the function from a document to its token ids.
        progress: called with the number of documents of each finished shard.

    Returns:
        The manifest: shards, documents and tokens.
    """
    workers = workers or len(os.sched_getaffinity(0))
    out.mkdir(parents=True, exist_ok=True)
    sha256 = tokenizer_hash(tokenizer_dir / "tokenizer.json")
    manifest = {"shards": 0, "documents": 0, "tokens": 0}
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(make_encoder, tokenizer_dir)) as pool:
        running: list[tuple[int, Any]] = []

        def finish_one() -> None:
            count, future = running.pop(0)
            manifest["tokens"] += future.result()
            manifest["documents"] += count
            progress(count)

        while part := list(islice(documents, documents_per_shard)):
            path = out / f"{manifest['shards']:05d}.shard"
            running.append((len(part), pool.submit(_tokenize_part, path, part, vocab_size, sha256)))
            manifest["shards"] += 1
            if len(running) >= 2 * workers:
                finish_one()
        while running:
            finish_one()
    (out / "manifest.json").write_text(json.dumps(manifest) + "\n")
    return manifest


def open_shards(folder: Path, tokenizer_dir: Path) -> list[Shard]:
    """The shards of a finished folder, in order.

    Raises:
        ValueError: the folder is incomplete, or its shards were made with another tokenizer.
    """
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} has no manifest.json: tokenising did not finish; delete the folder and run again")
    sha256 = tokenizer_hash(tokenizer_dir / "tokenizer.json")
    return [Shard(path, sha256) for path in sorted(folder.glob("*.shard"))]
