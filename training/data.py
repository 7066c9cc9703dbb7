"""From shards to batches: whole documents packed into windows of fixed length.

    shards -> documents in an order that depends on (seed, epoch) alone -> windows filled in that order -> batches

A document is never split and windows never let one document see another: positions start again at 0 with each
document, which the models take as a boundary. What a step sees is a pure function of (seed, step), so a resumed run
needs only its step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.shards import Shard

IGNORED = -100  # the label that no loss is computed for


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B windows, T tokens each.

    Attributes:
        input_ids: (B, T) int64; padded with 0.
        position_ids: (B, T) int64; start again at 0 with each document.
        labels: (B, T) int64; the token after each input, or -100 where there is no loss.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    @property
    def loss_tokens(self) -> int:
        """How many tokens the loss is taken over."""
        return int((self.labels != IGNORED).sum())


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
            raise ValueError(f"a document has {longest} tokens, a window holds {window + 1}: raise data.window")
        self._epoch = -1
        self._order = self._starts = np.empty(0, dtype=np.int64)

    def _load_epoch(self, epoch: int) -> None:
        """Orders the documents of an epoch and finds where each window begins in that order."""
        if epoch == self._epoch:
            return
        self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[self._order] - 1)  # a document of n tokens gives n - 1 inputs
        starts = [0]
        while starts[-1] < len(ends):
            used = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(np.searchsorted(ends, used + self.window, side="right")))
        self._starts = np.asarray(starts)
        self._epoch = epoch
        if self.batches_per_epoch == 0:
            raise ValueError(f"{len(starts) - 1} windows do not fill a batch of {self.batch_size}: lower batch_size")

    @property
    def batches_per_epoch(self) -> int:
        return (len(self._starts) - 1) // self.batch_size

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
        epoch, index = 0, first
        self._load_epoch(0)
        while index >= self.batches_per_epoch:
            index -= self.batches_per_epoch
            epoch += 1
            self._load_epoch(epoch)
        while True:
            yield self._batch(index)
            index += 1
            if index == self.batches_per_epoch:
                epoch, index = epoch + 1, 0
                self._load_epoch(epoch)

    def epoch(self) -> Iterator[Batch]:
        """The batches of the first epoch, once."""
        self._load_epoch(0)
        for index in range(self.batches_per_epoch):
            yield self._batch(index)

    def _batch(self, index: int) -> Batch:
        shape = (self.batch_size, self.window)
        inputs, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for row in range(self.batch_size):
            window = index * self.batch_size + row
            at = 0
            for document in self._order[self._starts[window] : self._starts[window + 1]]:
                ids = self._document(int(document)).astype(np.int64)
                span = slice(at, at + len(ids) - 1)
                inputs[row, span] = ids[:-1]
                positions[row, span] = np.arange(len(ids) - 1)
                labels[row, span] = self._labels(ids)
                at = span.stop
            positions[row, at:] = np.arange(self.window - at)  # the padding is a document of its own
        return Batch(torch.from_numpy(inputs), torch.from_numpy(positions), torch.from_numpy(labels))
