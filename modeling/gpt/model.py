"""GPT as a trainable torch module, usable through Hugging Face's auto classes and ``generate()``.

    h = E[ids] + P[0..T-1];  per layer:  h += Attn(LN(h));  h += MLP(LN(h));  logits = LN(h) @ W_head^T

Radford et al. 2019 (GPT-2), but: no output projection (the heads are just concatenated), no biases on queries, keys and
values, and a head that is not the embedding. LayerNorm with biased variance, GELU in its tanh approximation
(Hendrycks & Gimpel 2016).

With ``causal=False`` every token sees the whole sequence, as in the published training. Nothing can be cached then:
``generate()`` computes the whole sequence again for each token.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, F intermediate_size, V vocab_size,
H heads, D head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling.gpt.config import GPTConfig
from modeling.layers.decoding import CausalLMHead, begin, begin_bidirectional
from modeling.layers.tensor_plan import TensorPlan


class Attention(nn.Module):
    """Multi-head attention without an output projection."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.causal = layer_idx, config.head_dim, config.causal
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None and q.shape[2] > 1,
        )  # (B, H, T, D)  # fmt: skip
        return y.transpose(1, 2).flatten(2)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # set by the configuration
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # (B, T, F) -> (B, T, C)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, cache))  # (B, T, C)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # (B, T, C)


class GPTPreTrainedModel(PreTrainedModel):
    config_class = GPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class GPTModel(GPTPreTrainedModel):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
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
        if self.config.causal:
            step = begin(self.config, x, attention_mask, position_ids, past_key_values, use_cache)
        elif past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("a GPT with causal=False has no cache: each new token changes all earlier states")
        else:
            step = begin_bidirectional(self.config, x, attention_mask, position_ids)
        x = self.dropout(x + self.embed_positions(step.positions))
        for layer in self.layers:
            x = layer(x, step.mask, step.cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=step.cache)


class GPTForCausalLM(CausalLMHead, GPTPreTrainedModel, GenerationMixin):
    """GPT with its head; ``forward`` is :class:`CausalLMHead`'s."""

    tensor_plan = TensorPlan(
        modules={
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.k_proj": "colwise",
            "model.layers.*.self_attn.v_proj": "colwise",
            "model.layers.*.self_attn": "gather",  # there is no output projection to sum in
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise",
        },
        divided=("num_attention_heads", "intermediate_size"),
    )

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate()``; without a cache where the model is not causal."""
        if not self.config.causal:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)
