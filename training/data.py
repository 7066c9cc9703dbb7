"""From shards to batches: windows of fixed length in an order that only seed and step decide.

    shards -> windows, numbered -> a permutation of the numbers for each epoch -> batches

**documents**: a window holds whole documents, one after the other as they are stored, and none sees another: positions
start again at 0 with each, which the models take as a boundary. A document longer than a window is cut into pieces.

**stream**: a window is the next stretch of all text; documents in it see each other, positions run through.

Which windows a step sees is a pure function of (seed, step): windows are counted through all epochs, and the
permutation of an epoch is computed, not stored. So a resumed run needs its step alone, and any number of ranks share a
step's windows without talking. Tokens are read from the mapped files; in memory are eight bytes a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from modeling.layers.objective import IGNORED
from training.shards import Shard


class NoText(ValueError):
    """There is nothing in the shards that a window could be made of."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B windows, T tokens each.

    Attributes:
        input_ids: (B, T) int64; padded with 0.
        position_ids: (B, T) int64; start again at 0 with each document.
        labels: (B, T) int64; the token after each input, or ``IGNORED`` where there is no loss.
        is_text: (B, T) bool; false for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    is_text: Tensor

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        # Pinned, so that the copy goes on while the device computes.
        return Batch(*(getattr(self, f.name).pin_memory().to(device, non_blocking=True) for f in fields(self)))


class Windows:
    """The windows of a data set, addressed by number.

    Args:
        shards: where the documents are; a window lies within one.
        window: tokens a window (T).
        seed: of the order.
        stream: windows are stretches of the text, documents in them see each other.
        answer_span: ``(start, end)`` token ids; the loss is taken only on tokens after ``start`` up to and including
            ``end``. None: on every token.

    Raises:
        NoText: there is nothing to learn from.
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        shards: list[Shard],
        window: int,
        seed: int,
        stream: bool = False,
        answer_span: tuple[int, int] | None = None,
    ) -> None:
        if stream and answer_span is not None:
            raise ValueError("train.loss_on='answers' needs whole documents: set data.windows=documents")
        self.shards, self.window, self.seed = shards, window, seed
        self.stream, self.answer_span = stream, answer_span
        self._starts = [self._starts_in(shard) for shard in shards]
        counts = [(max(0, len(shard.tokens) - 1) // window if stream else len(starts) - 1)
                  for shard, starts in zip(shards, self._starts, strict=True)]  # fmt: skip
        self.first_of_shard = np.cumsum([0, *counts])
        if not len(self):
            raise NoText("there is no text to train on: no document has two tokens, or none fills a window")

    def __len__(self) -> int:
        """Windows an epoch."""
        return int(self.first_of_shard[-1])

    def _starts_in(self, shard: Shard) -> np.ndarray:
        """(windows + 1, 2) uint32: document and place in it at which each window starts, then where the last ends."""
        if self.stream:
            return np.empty((1, 2), np.uint32)
        # A document of n tokens gives n - 1 inputs; one of a single token, or none, gives nothing to learn.
        inputs = np.maximum(np.diff(shard.offsets.astype(np.int64)) - 1, 0)
        if self.answer_span is not None and len(inputs) and (longest := int(inputs.max())) > self.window:
            raise ValueError(
                f"a document has {longest + 1} tokens, a window holds {self.window + 1}: raise train.window, "
                "or set train.loss_on=all, which lets documents be cut"
            )
        pieces = -(-inputs // self.window)
        document = np.repeat(np.arange(len(inputs)), pieces)
        place = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * self.window
        ends = np.cumsum(np.minimum(inputs[document] - place, self.window))
        starts = [0]
        while starts[-1] < len(document):
            used = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(np.searchsorted(ends, used + self.window, side="right")))
        document, place = np.append(document, len(inputs)), np.append(place, 0)
        return np.stack([document[starts], place[starts]], axis=1).astype(np.uint32)

    def numbers(self, first: int, count: int) -> np.ndarray:
        """The numbers of ``count`` windows from the ``first`` on, counted through all epochs: (count,) int64."""
        places = np.arange(first, first + count)
        epochs = places // len(self)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            numbers[of_epoch] = permuted(places[of_epoch] % len(self), len(self), self.seed, int(epoch))
        return numbers

    def batch(self, numbers: np.ndarray, rows: int | None = None) -> Batch:
        """The windows of these numbers, one a row; rows beyond them, up to ``rows``, are padding."""
        shape = (rows or len(numbers), self.window)
        inputs, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, is_text = np.full(shape, IGNORED, np.int64), np.zeros(shape, bool)
        positions[:] = np.arange(self.window)
        for row, number in enumerate(numbers):
            which = int(np.searchsorted(self.first_of_shard, number, side="right")) - 1
            local = int(number - self.first_of_shard[which])
            if self.stream:
                ids = self.shards[which].tokens[local * self.window : (local + 1) * self.window + 1]
                inputs[row], labels[row], is_text[row] = ids[:-1], ids[1:], True
                continue
            at = 0
            for ids, targets in self._pieces(which, local):
                span = slice(at, at + len(ids))
                inputs[row, span], labels[row, span], is_text[row, span] = ids, targets, True
                positions[row, span] = np.arange(len(ids))
                at = span.stop
            positions[row, at:] = np.arange(self.window - at)  # the padding is a document of its own
        return Batch(*map(torch.from_numpy, (inputs, positions, labels, is_text)))

    def _pieces(self, which: int, local: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and labels of each document, or piece of one, in a window."""
        shard = self.shards[which]
        (document, place), (last, rest) = (map(int, self._starts[which][i]) for i in (local, local + 1))
        while (document, place) < (last, rest):
            ids = shard.tokens[int(shard.offsets[document]) : int(shard.offsets[document + 1])]
            stop = min(place + self.window, len(ids) - 1)
            if stop > place:
                yield ids[place:stop], self._labels(ids)[place:stop]
            document, place = (document, stop) if stop < len(ids) - 1 else (document + 1, 0)

    def _labels(self, ids: np.ndarray) -> np.ndarray:
        if self.answer_span is None:
            return ids[1:]
        start, end = self.answer_span
        # Inside an answer: more starts than ends among the tokens up to and including the input.
        depth = np.cumsum((ids == start).astype(np.int64) - (ids == end))
        return np.where(depth[:-1] > 0, ids[1:].astype(np.int64), IGNORED)

    def micro_batches(self, step: int, windows: int, size: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """What rank ``rank`` of ``world`` computes in a step of ``windows`` windows, at most ``size`` at a time."""
        share = windows // world
        size = min(size, share)
        numbers = self.numbers(step * windows + rank * share, share)
        return [self.batch(numbers[i : i + size]) for i in range(0, share, size)]

    def in_order(self, size: int, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Batch]:
        """All windows once (or the first ``limit``), as they are stored; every rank gets the same number of batches."""
        count = min(limit, len(self)) if limit else len(self)
        for first in range(0, count, size * world):
            begin = first + rank * size
            yield self.batch(np.arange(min(begin, count), min(begin + size, count)), rows=size)


def permuted(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of ``range(n)`` that depends on seed and epoch takes ``places``: (count,) int64.

    A Feistel network over the next power of four, walked until the result is below ``n`` (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 5): any element is computed without the others.
    """
    half = max(1, -(-(n - 1).bit_length() // 2)) if n > 1 else 1
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)
    x = places.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        x[todo] = (left << np.uint64(half)) | right
        todo = x >= n
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
