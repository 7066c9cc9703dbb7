"""Token shards: tokenised documents in one memory-mapped file each.

A shard is a header, the tokens of all documents one after the other, and the offset at which each document starts:

    magic 8 | version u32 | bytes per token u32 | tokens u64 | documents u64 | tokenizer sha256 32 | tokens | offsets

Numbers are little-endian. Tokens are uint16 when the vocabulary allows it, else uint32; offsets are uint64, one more
than there are documents. Reading maps the file: it copies nothing and takes no memory of its own.

A folder of shards has a ``manifest.json``, written last: vocabulary, tokenizer, sums, the name, SHA-256 and sizes of
each shard, and a fingerprint of it all.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MEDTOKEN"
VERSION = 1
MANIFEST_VERSION = 2
_HEADER = struct.Struct("<8sIIQQ32s")
HEADER_SIZE = _HEADER.size


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies of up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def tokenizer_hash(path: Path) -> bytes:
    """SHA-256 of a ``tokenizer.json``: shards made with another tokenizer are refused."""
    return hashlib.sha256(path.read_bytes()).digest()


def header(dtype: np.dtype, tokens: int, documents: int, tokenizer_sha256: bytes) -> bytes:
    """The first ``HEADER_SIZE`` bytes of a shard."""
    return _HEADER.pack(MAGIC, VERSION, dtype.itemsize, tokens, documents, tokenizer_sha256)


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
        f.write(header(dtype, offsets[-1], len(offsets) - 1, tokenizer_sha256))
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)


class Shard:
    """A shard opened for reading.

    Attributes:
        tokens: all tokens, ``(tokens,)`` uint16 or uint32, memory-mapped.
        offsets: ``(documents + 1,)`` uint64, memory-mapped.

    Raises:
        ValueError: not a shard, not a whole one, or made with another tokenizer; the message names the file.
    """

    def __init__(self, path: Path, tokenizer_sha256: bytes | None = None) -> None:
        with path.open("rb") as f:
            head = f.read(_HEADER.size)
            size = os.fstat(f.fileno()).st_size
        if len(head) < _HEADER.size or head[:8] != MAGIC:
            raise ValueError(f"{path} is not a token shard")
        _, version, width, tokens, documents, made_with = _HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path} is a shard of version {version}; this program reads version {VERSION}")
        if tokenizer_sha256 is not None and made_with != tokenizer_sha256:
            raise ValueError(f"{path} was made with another tokenizer: delete the folder {path.parent} to remake it")
        whole = _HEADER.size + tokens * width + (documents + 1) * 8
        if width not in (2, 4) or size != whole:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes, its header says {whole:,}; remake the folder")
        # numpy maps no empty array.
        self.tokens = (
            np.memmap(path, dtype=f"<u{width}", mode="r", offset=_HEADER.size, shape=(tokens,))
            if tokens
            else np.empty(0, f"<u{width}")
        )
        self.offsets = np.memmap(
            path, dtype="<u8", mode="r", offset=_HEADER.size + tokens * width, shape=(documents + 1,)
        )


def describe_shard(path: Path, tokens: int, documents: int) -> dict[str, Any]:
    """A finished shard's entry in the manifest."""
    with path.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {
        "name": path.name, "sha256": sha256, "documents": documents, "tokens": tokens, "size": path.stat().st_size,
    }  # fmt: skip


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], vocab_size: int, tokenizer_sha256: bytes, text_bytes: int
) -> dict[str, Any]:
    """Writes ``manifest.json``, atomically, and returns it.

    Args:
        shards: of :func:`describe_shard`, in order.
        text_bytes: of the documents' text in UTF-8.
    """
    manifest = {
        "version": MANIFEST_VERSION,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256.hex(),
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": text_bytes,
        "fingerprint": _fingerprint(tokenizer_sha256.hex(), shards),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file such that it is there wholly or, after a crash, as it was."""
    partial = path.with_suffix(".json.partial")
    with partial.open("w") as f:
        f.write(json.dumps(content, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _fingerprint(tokenizer_sha256: str, shards: list[dict[str, Any]]) -> str:
    content = [tokenizer_sha256, *(f"{shard['name']} {shard['sha256']}" for shard in shards)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        ValueError: there is none, so the folder is unfinished; or it is not one.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no manifest.json: making it did not finish, or it holds no shards; make it again"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest.get("version", 1)
        if version != MANIFEST_VERSION:
            raise ValueError(f"of version {version}, this program reads version {MANIFEST_VERSION}")
        if manifest["fingerprint"] != _fingerprint(manifest["tokenizer_sha256"], manifest["shards"]):
            raise ValueError("its fingerprint is not that of what it names")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a manifest ({e}): delete the folder {folder} and make it again") from e
    return manifest


def fingerprint(folder: Path) -> str:
    """What identifies a folder of shards: SHA-256 over its tokenizer's and every shard's name and hash."""
    return read_manifest(folder)["fingerprint"]


_encode: Callable[[Any], list[int]]  # of this worker process


def _start_worker(make_encoder: Callable[[Path], Callable[[Any], list[int]]], tokenizer_dir: Path) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _encode = make_encoder(tokenizer_dir)


def _tokenize_part(path: Path, documents: list[Any], vocab_size: int, sha256: bytes) -> tuple[dict[str, Any], int]:
    encoded = [_encode(document) for document in documents]
    write_shard(path, encoded, vocab_size, sha256)
    text_bytes = sum(len(text.encode(errors="replace")) for document in documents for text in _texts(document))
    return describe_shard(path, sum(len(ids) for ids in encoded), len(encoded)), text_bytes


def _texts(document: Any) -> list[str]:
    """A document's text; a conversation's are what its messages say."""
    return [document] if isinstance(document, str) else [message["content"] for message in document]


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
        The manifest.
    """
    workers = workers or len(os.sched_getaffinity(0))
    out.mkdir(parents=True, exist_ok=True)
    sha256 = tokenizer_hash(tokenizer_dir / "tokenizer.json")
    shards: list[dict[str, Any]] = []
    text_bytes = 0
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(make_encoder, tokenizer_dir)) as pool:
        running: list[Any] = []

        def finish_one() -> None:
            nonlocal text_bytes
            shard, size = running.pop(0).result()
            shards.append(shard)
            text_bytes += size
            progress(shard["documents"])

        for number in count():
            if not (part := list(islice(documents, documents_per_shard))):
                break
            running.append(pool.submit(_tokenize_part, out / f"{number:05d}.shard", part, vocab_size, sha256))
            if len(running) >= 2 * workers:
                finish_one()
        while running:
            finish_one()
    return write_manifest(out, shards, vocab_size, sha256, text_bytes)


def open_shards(folder: Path, tokenizer_dir: Path, verify: bool = True) -> list[Shard]:
    """The shards of a finished folder, in order.

    Args:
        folder: has a ``manifest.json``.
        tokenizer_dir: has the ``tokenizer.json`` that they were made with.
        verify: compares each shard's SHA-256, which reads the folder once. Presence, size and header are always
            looked at.

    Raises:
        ValueError: the folder is unfinished, its shards were made with another tokenizer, or a shard is missing,
            foreign or damaged; the message names the file.
    """
    manifest = read_manifest(folder)
    sha256 = tokenizer_hash(tokenizer_dir / "tokenizer.json")
    if manifest["tokenizer_sha256"] != sha256.hex():
        raise ValueError(f"{folder} was made with another tokenizer than {tokenizer_dir}: make it again with this one")
    shards = []
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {folder / 'manifest.json'} names it: make the folder again")
        if path.stat().st_size != entry["size"]:
            raise ValueError(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes instead of {entry['size']:,}; "
                "make the folder again"
            )
        shard = Shard(path, sha256)
        if (len(shard.tokens), len(shard.offsets) - 1) != (entry["tokens"], entry["documents"]):
            raise ValueError(f"{path} is not the shard that the manifest names: make the folder again")
        if verify:
            with path.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                    raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; make the folder again")
        shards.append(shard)
    known = {entry["name"] for entry in manifest["shards"]}
    if foreign := sorted(path.name for path in folder.glob("*.shard") if path.name not in known):
        raise ValueError(f"{folder / foreign[0]} is foreign: the manifest does not name it; move it away")
    return shards
