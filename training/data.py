"""From shards to batches: whole documents packed into windows of fixed length.

    shards -> documents in an order that depends on (seed, epoch) alone -> windows filled in that order -> batches

A document is never split and windows never let one document see another: positions start again at 0 with each
document, which the models take as a boundary. What a step sees is a pure function of (seed, step), so a resumed run
needs only its step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
import torch
from torch import Tensor

from modeling.layers.objective import IGNORED
from training.shards import Shard


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


class PackedDocuments:
    """Batches of packed documents, addressed by step.

    Args:
        shards: where the documents are.
        window: tokens a window (T).
        batch_size: windows a batch (B).
        seed: of the order of documents.
        answer_span: ``(start, end)`` token ids; the loss is taken only on tokens after ``start`` up to and including
            ``end``. None: on every token.

    Raises:
        ValueError: no documents, fewer windows than a batch, or a document longer than a window.
    """

    def __init__(
        self, shards: list[Shard], window: int, batch_size: int, seed: int, answer_span: tuple[int, int] | None = None
    ) -> None:
        self.shards = shards
        self.window, self.batch_size, self.seed, self.answer_span = window, batch_size, seed, answer_span
        lengths = [np.diff(shard.offsets.astype(np.int64)) for shard in shards]
        if not lengths or not sum(map(len, lengths)):
            raise ValueError("there are no documents to train on")
        self.lengths = np.concatenate(lengths)
        self.shard_of = np.repeat(np.arange(len(shards)), [len(x) for x in lengths])
        self.first_of_shard = np.cumsum([0] + [len(x) for x in lengths])
        if (longest := int(self.lengths.max())) > window + 1:
            raise ValueError(f"a document has {longest} tokens, a window holds {window + 1}: raise train.window")
        if not self._windows(0):
            raise ValueError(f"the documents do not fill a batch of {batch_size} windows: lower train.batch_size")

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """The documents of each window of an epoch, by index; what does not fill a batch is left out."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        # A document of n tokens gives n - 1 inputs; one of a single token, or none, gives nothing to learn.
        order = order[self.lengths[order] > 1]
        ends = np.cumsum(self.lengths[order] - 1)
        starts = [0]
        while starts[-1] < len(ends):
            used = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(np.searchsorted(ends, used + self.window, side="right")))
        whole = (len(starts) - 1) // self.batch_size * self.batch_size
        return [order[a:b] for a, b in pairwise(starts[: whole + 1])]

    def _document(self, index: int) -> np.ndarray:
        shard = self.shards[self.shard_of[index]]
        local = index - self.first_of_shard[self.shard_of[index]]
        return shard.tokens[int(shard.offsets[local]) : int(shard.offsets[local + 1])]

    def _labels(self, ids: np.ndarray) -> np.ndarray:
        if self.answer_span is None:
            return ids[1:]
        start, end = self.answer_span
        # Inside an answer: more starts than ends among the tokens up to and including the input.
        depth = np.cumsum((ids == start).astype(np.int64) - (ids == end))
        return np.where(depth[:-1] > 0, ids[1:], IGNORED)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Endless batches from batch number ``first`` on (epochs follow one another)."""
        for epoch in count():
            windows = self._windows(epoch)
            batches = len(windows) // self.batch_size
            for index in range(first, batches):
                yield self._batch(windows[index * self.batch_size : (index + 1) * self.batch_size])
            first = max(0, first - batches)

    def epoch(self) -> Iterator[Batch]:
        """The batches of the first epoch, once."""
        windows = self._windows(0)
        for start in range(0, len(windows), self.batch_size):
            yield self._batch(windows[start : start + self.batch_size])

    def _batch(self, windows: list[np.ndarray]) -> Batch:
        shape = (self.batch_size, self.window)
        inputs, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels, is_text = np.full(shape, IGNORED, np.int64), np.zeros(shape, bool)
        for row, documents in enumerate(windows):
            at = 0
            for document in documents:
                ids = self._document(int(document)).astype(np.int64)
                span = slice(at, at + len(ids) - 1)
                inputs[row, span] = ids[:-1]
                positions[row, span] = np.arange(len(ids) - 1)
                labels[row, span] = self._labels(ids)
                is_text[row, span] = True
                at = span.stop
            positions[row, at:] = np.arange(self.window - at)  # the padding is a document of its own
        return Batch(*map(torch.from_numpy, (inputs, positions, labels, is_text)))
