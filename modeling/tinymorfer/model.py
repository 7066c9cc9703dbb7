"""Tinymorfer as a trainable torch module, usable through Hugging Face's auto classes and ``generate()``.

    h = E[ids] + P[0..T-1];  per block:  h += Attn(LN(h));  h += MLP(LN(h));  logits = LN_f(h) @ E^T

The block is the published one: its two sublayers share one LayerNorm, queries, keys and values come from one fused
projection without bias, and the MLP has exact GELU. The published program has a single block on continuous vectors;
embedding, learned positions, final norm and tied head are this project's, to make it a language model.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, F intermediate_size, V vocab_size,
H heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling.layers.decoding import CausalLMHead, begin
from modeling.layers.tensor_plan import TensorPlan
from modeling.tinymorfer.config import TinymorferConfig


class Attention(nn.Module):
    """Causal multi-head attention with a fused projection: rows of queries, then keys, then values."""

    def __init__(self, config: TinymorferConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_dim))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: TinymorferConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))  # (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Pre-norm attention and MLP behind the same LayerNorm, each added to the residual stream."""

    def __init__(self, config: TinymorferConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.norm(x), mask, cache))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm(x)))  # (B, T, C)


class TinymorferPreTrainedModel(PreTrainedModel):
    config_class = TinymorferConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class TinymorferModel(TinymorferPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: TinymorferConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        positions, mask, cache = begin(self.config, x, attention_mask, position_ids, past_key_values, use_cache)
        x = x + self.embed_positions(positions)
        for block in self.layers:
            x = block(x, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class TinymorferForCausalLM(CausalLMHead, TinymorferPreTrainedModel, GenerationMixin):
    """Tinymorfer with its tied head; ``forward`` is :class:`CausalLMHead`'s."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Equal parts of the fused projection's rows would not be heads: attention is every rank's.
    tensor_plan = TensorPlan(
        modules={"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.down_proj": "rowwise"},
        divided=("intermediate_size",),
    )

    def __init__(self, config: TinymorferConfig) -> None:
        super().__init__(config)
        self.model = TinymorferModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
