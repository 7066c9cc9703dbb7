"""MedAssistGPT as a trainable torch module, usable through Hugging Face's auto classes and ``generate()``.

    h = E[ids];  per layer:  h += Attn(RMSNorm(h));  h += SwiGLU(RMSNorm(h));  logits = RMSNorm(h) @ E^T

RMSNorm: Zhang & Sennrich 2019. Grouped-query attention: Ainslie et al. 2023. SwiGLU: Shazeer 2020. No biases, no
embedding scale, tied head. Tensor names are Llama's. With ``rope_layout="per_head"`` the module computes exactly what
``LlamaForCausalLM`` does with the same weights (``tests/modeling/test_medassist.py``).

Deliberately missing: attention weights as an output.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, F intermediate_size, V vocab_size,
H query heads, K key/value heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling.layers.decoding import CausalLMHead, begin
from modeling.layers.rope import cos_sin, inverse_frequencies, rotate_halves, rotate_neighbours
from modeling.layers.tensor_plan import TensorPlan
from modeling.medassist.config import MedAssistGPTConfig

CosSin = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal grouped-query attention over flat projections, rotated in the configuration's layout."""

    def __init__(self, config: MedAssistGPTConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # set by the configuration
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.flattened = config.rope_layout == "flattened"
        self.tensor_rank = 0  # which part of the heads this is, where ranks share them (TensorPlan)
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope_q: CosSin, rope_k: CosSin, mask: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H*D), (B, T, K*D), (B, T, K*D)
        if self.flattened:
            q, k = rotate_neighbours(q, *self._own(rope_q, q)), rotate_neighbours(k, *self._own(rope_k, k))
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = k.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        if not self.flattened:
            cos, sin = rope_q[0][:, None], rope_q[1][:, None]  # (B, 1, T, D/2)
            q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, K, S, D)
        # Without a mask the sequence is either whole (causal) or one new token (which sees everything).
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True
        )  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def _own(self, rope: CosSin, x: Tensor) -> CosSin:
        """The angles, of those of all heads side by side, that belong to this rank's part ``x`` of the projection."""
        width = x.shape[-1] // 2
        own = slice(self.tensor_rank * width, (self.tensor_rank + 1) * width)
        return rope[0][..., own], rope[1][..., own]


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: MedAssistGPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) -> (B, T, C)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: MedAssistGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, rope_q: CosSin, rope_k: CosSin, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope_q, rope_k, mask, cache))  # (B, T, C)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # (B, T, C)


class MedAssistGPTPreTrainedModel(PreTrainedModel):
    config_class = MedAssistGPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)


class MedAssistGPTModel(MedAssistGPTPreTrainedModel):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, config: MedAssistGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def _rope(self, positions: Tensor) -> tuple[CosSin, CosSin]:
        """Cosines and sines for queries and keys. The tables are rebuilt from the configuration: a buffer would be
        lost when the model is built on the meta device, and rounded by ``model.to(torch.bfloat16)``."""
        c, theta = self.config, self.config.rope_parameters["rope_theta"]
        if c.rope_layout == "per_head":
            table = cos_sin(positions, inverse_frequencies(c.head_dim, theta))  # (B, T, D/2) each
            return table, table
        return (
            cos_sin(positions, inverse_frequencies(c.num_attention_heads * c.head_dim, theta)),  # (B, T, H*D/2)
            cos_sin(positions, inverse_frequencies(c.num_key_value_heads * c.head_dim, theta)),  # (B, T, K*D/2)
        )

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
        rope_q, rope_k = self._rope(positions)
        for layer in self.layers:
            x = layer(x, rope_q, rope_k, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class MedAssistGPTForCausalLM(CausalLMHead, MedAssistGPTPreTrainedModel, GenerationMixin):
    """MedAssistGPT with its tied head; ``forward`` is :class:`CausalLMHead`'s."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    tensor_plan = TensorPlan(
        modules={
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.k_proj": "colwise",
            "model.layers.*.self_attn.v_proj": "colwise",
            "model.layers.*.self_attn.o_proj": "rowwise",
            "model.layers.*.mlp.gate_proj": "colwise",
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise",
        },
        divided=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    )

    def __init__(self, config: MedAssistGPTConfig) -> None:
        super().__init__(config)
        self.model = MedAssistGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
