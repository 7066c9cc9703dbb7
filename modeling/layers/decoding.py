"""What every decoder does around its layers: mask, positions and cache before them, head and loss after them.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, V vocab_size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling.layers.objective import LanguageModelObjective


class Step(NamedTuple):
    """One forward pass: ``positions`` (B or 1, T); ``mask`` None or (B, 1, T, S), true where a token is seen."""

    positions: Tensor
    mask: Tensor | None
    cache: Cache | None


def begin(
    config: Any,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool,
) -> Step:
    """Positions, causal mask and cache for the embedded tokens ``x`` (B, T, C).

    Positions that start again at 0 within a row are packed documents, which do not see each other.

    Raises:
        ValueError: the sequence is longer than the model's positions.
    """
    # A cache holds one sequence a row; packed documents are several.
    packed = position_ids is not None and past_key_values is None and bool((position_ids.diff() < 0).any())
    if use_cache and past_key_values is None and not packed:
        past_key_values = DynamicCache(config=config)
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    check_length(config, past + x.shape[1])
    mask = create_causal_mask(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    if position_ids is None:
        position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
    return Step(position_ids, mask, past_key_values)


def begin_bidirectional(config: Any, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Step:
    """The same for a model whose tokens all see each other: nothing can be cached.

    Raises:
        ValueError: the sequence is longer than the model's positions.
    """
    check_length(config, x.shape[1])
    mask = None
    if attention_mask is not None and not attention_mask.bool().all():
        mask = attention_mask[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1)  # (B, 1, T, T)
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    document = F.pad((position_ids.diff() != 1).cumsum(-1), (1, 0))  # (B, T): how many began before
    if bool(document.any()):
        same = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
        mask = same if mask is None else same & mask
    if mask is not None:  # padding sees itself: a row without any key would be NaN
        mask = mask | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return Step(position_ids, mask, None)


def check_length(config: Any, length: int) -> None:
    longest = config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"{length} tokens are more than the {longest} this model was built for (max_position_embeddings)"
        )


class CausalLMHead(LanguageModelObjective):
    """``forward`` and training objective of a ``PreTrainedModel`` with a ``model`` (the body) and an ``lm_head``.

    It takes ``input_ids`` (B, T), optionally ``attention_mask`` (B, S), ``position_ids`` (B, T), a cache and ``labels``
    (B, T; -100 is ignored; shifted here), and returns logits (B, T, V).
    """

    # Hugging Face's Trainer would take **kwargs for a sign that the loss is divided by its ``num_items_in_batch``.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])  # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
