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
import torch.nn.functional as F
from torch import Tensor

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
    """The objective of a model with ``model`` (the body) and ``lm_head``: cross-entropy of the next token, in nats."""

    model: Any
    lm_head: Any

    @property
    def loss_weights(self) -> dict[str, float]:
        """Name of each part -> its factor in the loss. "loss" is the language model's own, the one that is reported."""
        return {"loss": 1.0}

    def loss_counts(self, batch: Batch) -> dict[str, int]:
        """Name of each part -> how many terms its sum over this batch has."""
        return {"loss": count(batch.labels)}

    def objective(self, batch: Batch) -> Objective:
        hidden = self.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        return Objective({"loss": self.summed_loss(hidden, batch.labels)})

    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropy over labels (B, T) that are not ``IGNORED``, from hidden states (B, T, C)."""
        where = labels != IGNORED
        logits = self.lm_head(hidden[where])  # the head runs only where there is a loss: (count, V)
        return F.cross_entropy(logits.float(), labels[where], reduction="sum")

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
