"""What training asks of a model, so that one loop trains every architecture.

A step is made of micro-batches. A model says for each what it contributes as **sums**, and
what they are sums over, so that dividing is left to the loop, which knows the whole step: the loss does not depend on
how a step is cut.

    counts = total of model.loss_counts(batch) over the step's micro-batches, name by name
    loss   = total of model.loss_weights[name] * model.objective(batch).sums[name] / counts[name]
    model.after_step(total of model.objective(batch).statistics)      once, after the optimizer

Shapes: B windows, T tokens, C hidden_size.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from modeling.layers.cross_entropy import chunked_cross_entropy

IGNORED = -100  # the label that no loss is computed for


class Batch(Protocol):
    """One micro-batch of packed documents.

    Attributes:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64; start again at 0 with each document.
        labels: (B, T) int64; the token after each input, or ``IGNORED``.
        is_text: (B, T) bool; false for padding.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def is_text(self) -> Tensor: ...


@dataclass
class Objective:
    """What a micro-batch contributes to a step.

    Attributes:
        sums: name -> scalar, with a gradient: a loss summed over what ``loss_counts`` counts under that name.
        statistics: name -> tensor without gradient; added up over the step and handed to ``after_step``.
    """

    sums: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)


class LanguageModelObjective:
    """The objective of a model with ``model`` (the body) and ``lm_head``: cross-entropy of the next token, in nats.

    Attributes:
        loss_chunk: tokens that there are logits of at one time; 0: chosen by the vocabulary.
        z_loss: factor of the z-loss, the mean squared logarithm of the softmax's denominator, which keeps logits from
            growing together; 0: without.
    """

    model: Any
    lm_head: Any
    loss_chunk: int = 0
    z_loss: float = 0.0

    @property
    def loss_weights(self) -> dict[str, float]:
        """Name of each part -> its factor in the loss. "loss" is the language model's own, the one that is reported."""
        return {"loss": 1.0} | ({"z_loss": self.z_loss} if self.z_loss else {})

    def loss_counts(self, batch: Batch) -> dict[str, int]:
        """Name of each part -> how many terms its sum over this batch has."""
        terms = count(batch.labels)
        return {"loss": terms} | ({"z_loss": terms} if self.z_loss else {})

    def objective(self, batch: Batch) -> Objective:
        hidden = self.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        return Objective(self.language_losses(hidden, batch.labels))

    def language_losses(self, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The language model's own parts, "loss" and with ``z_loss`` "z_loss", summed over labels (B, T) that are not
        ``IGNORED``, from hidden states (B, T, C). The gradient of both comes with "loss"."""
        ce, z = self._summed(hidden, labels, self.z_loss)
        return {"loss": ce} | ({"z_loss": z} if self.z_loss else {})

    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropy over labels (B, T) that are not ``IGNORED``, from hidden states (B, T, C)."""
        return self._summed(hidden, labels, 0.0)[0]

    def _summed(self, hidden: Tensor, labels: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
        head = self.lm_head
        assert type(head) is torch.nn.Linear  # only its weight is used: what else it did would be left out silently
        assert head.bias is None
        labels = labels.flatten()
        where = (labels != IGNORED).nonzero().squeeze(1)  # the head runs only where there is a loss
        hidden = hidden.flatten(0, 1).index_select(0, where)  # (count, C)
        return chunked_cross_entropy(hidden, head.weight, labels[where], self.loss_chunk, z_weight)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, tuple[float, int]]:
        """Name -> (sum, how many terms it has), of what is reported of held-out text: here the parts of the loss."""
        counts, sums = self.loss_counts(batch), self.objective(batch).sums
        return {name: (float(value), counts[name]) for name, value in sums.items()}

    def after_step(self, statistics: dict[str, Tensor]) -> dict[str, Any]:
        """Called once after each optimizer step, with the statistics of the whole step; returns what to log."""
        return {}


def count(labels: Tensor) -> int:
    """How many labels there are a loss for."""
    return int((labels != IGNORED).sum())
