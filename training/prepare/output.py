"""Shards that grow chunk by chunk and survive the death of the process that writes them.

The open shard of a split is ``NNNNN.partial`` (header to come, tokens) and ``NNNNN.lengths`` (tokens of each document,
uint32). A commit makes both durable and then notes how long they are. After a crash, whatever is longer is cut
back to the note, and work goes on as if nothing more had been done.
"""

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from training.shards import HEADER_SIZE, describe_shard, header, write_manifest

_BLOCK = 2**20


class SplitWriter:
    """The shards of one split.

    Args:
        folder: where they go.
        dtype: of tokens.
        tokenizer_sha256: for the header.
        noted: what :meth:`state` gave at the last commit; None begins anew.
    """

    def __init__(self, folder: Path, dtype: np.dtype, tokenizer_sha256: bytes, noted: dict[str, Any] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype, self.tokenizer_sha256 = folder, dtype, tokenizer_sha256
        noted = noted or {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}
        self.shards: list[dict[str, Any]] = noted["shards"]
        self.tokens, self.documents = int(noted["tokens"]), int(noted["documents"])  # of the open shard
        self.bytes = int(noted["bytes"])  # of the text of all shards
        self._written_lengths: list[Path] = []  # of shards finished since the last commit
        self._open(keep=self.tokens > 0)

    def _open(self, keep: bool) -> None:
        name = self.folder / f"{len(self.shards):05d}"
        self.partial, self.lengths = name.with_suffix(".partial"), name.with_suffix(".lengths")
        finished = {entry["name"] for entry in self.shards}
        if keep and not self.partial.exists():
            # It was finished after the last commit: take it back.
            name.with_suffix(".shard").rename(self.partial)
        for path in self.folder.iterdir():
            if path.name not in finished and path not in (self.partial, self.lengths, *self._written_lengths):
                path.unlink()
        mode = "r+b" if keep else "w+b"
        self._tokens: IO[bytes] = self.partial.open(mode)
        self._lengths: IO[bytes] = self.lengths.open(mode)
        self._tokens.truncate(HEADER_SIZE + self.tokens * self.dtype.itemsize)
        self._lengths.truncate(self.documents * 4)
        self._tokens.seek(0, os.SEEK_END)
        self._lengths.seek(0, os.SEEK_END)

    def append(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Adds documents: their tokens, one after the other, how many each has, and the bytes of their text."""
        assert tokens.dtype == self.dtype
        assert len(tokens) == lengths.sum()
        self._tokens.write(tokens.tobytes())
        self._lengths.write(lengths.astype("<u4").tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.bytes += text_bytes

    def finish_shard(self) -> None:
        """Closes the open shard, if it has any documents, and opens the next."""
        if not self.documents:
            return
        self._lengths.flush()
        self._lengths.seek(0)
        start = 0
        self._tokens.write(np.zeros(1, "<u8").tobytes())
        while block := self._lengths.read(_BLOCK):
            offsets = start + np.cumsum(np.frombuffer(block, "<u4").astype(np.uint64))
            self._tokens.write(offsets.astype("<u8").tobytes())
            start = int(offsets[-1])
        assert start == self.tokens
        self._tokens.seek(0)
        self._tokens.write(header(self.dtype, self.tokens, self.documents, self.tokenizer_sha256))
        self._sync()
        self._tokens.close()
        self._lengths.close()
        path = self.partial.with_suffix(".shard")
        self.partial.rename(path)
        self._written_lengths.append(self.lengths)
        self.shards.append(describe_shard(path, self.tokens, self.documents))
        self.tokens = self.documents = 0
        self._open(keep=False)

    def _sync(self) -> None:
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        """Makes all that was added durable and returns what to note."""
        self._sync()
        return {"shards": self.shards, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}

    def committed(self) -> None:
        """The note is durable: what only a return to an older one needed can go."""
        for path in self._written_lengths:
            path.unlink(missing_ok=True)
        self._written_lengths = []

    def close(self) -> None:
        self._tokens.close()
        self._lengths.close()

    def write_manifest(self, vocab_size: int) -> dict[str, Any]:
        """Ends the split: no open shard is left behind, and the manifest is there."""
        assert not self.documents
        self.close()
        self.partial.unlink()
        self.lengths.unlink()
        return write_manifest(self.folder, self.shards, vocab_size, self.tokenizer_sha256, self.bytes)
