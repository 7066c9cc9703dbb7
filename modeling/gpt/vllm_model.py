"""GPT for vLLM: paged KV cache, tensor and pipeline parallelism, LoRA, quantisation, torch.compile.

Loaded in the engine only, through ``serving.plugin``. With ``causal: false`` nothing can be cached but the token ids,
and each step computes each running sequence anew (:mod:`modeling.layers.vllm_window`).

Shapes: N tokens of all running requests, C hidden_size, F intermediate_size, H heads of this tensor-parallel rank,
D head_dim. Bidirectional: M tokens of all running sequences in place of N.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from modeling.gpt.config import GPTConfig
from modeling.layers.vllm_attention import PagedAttention
from modeling.layers.vllm_causal_lm import CausalLM
from modeling.layers.vllm_window import TokenCache, WindowAttention


class GPTAttention(nn.Module):
    def __init__(self, config: GPTConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise ValueError(
                f"{config.num_attention_heads} attention heads cannot be shared by {ranks} tensor-parallel ranks: "
                "choose a divisor"
            )
        self.ranks = ranks
        self.qkv_proj = QKVParallelLinear(
            hidden_size=config.hidden_size,
            head_size=config.head_dim,
            total_num_heads=config.num_attention_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        scale = config.head_dim**-0.5
        heads = config.num_attention_heads // ranks
        self.attn: nn.Module
        if config.causal:
            self.attn = PagedAttention(
                heads,
                config.head_dim,
                scale=scale,
                num_kv_heads=heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.attn",
            )
        else:
            self.attn = WindowAttention(config.head_dim, scale)

    def forward(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        qkv, _ = self.qkv_proj(x)  # (N, 3 * H * D)
        q, k, v = qkv.chunk(3, dim=-1)
        out = self.attn(q, k, v) if lengths is None else self.attn(q, k, v, lengths)  # (N, H * D)
        # No output projection, whose all-reduce would otherwise bring the ranks' heads together.
        return tensor_model_parallel_all_gather(out.contiguous()) if self.ranks > 1 else out  # (N, C)


class GPTMLP(nn.Module):
    def __init__(self, config: GPTConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.up_proj"
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        up, _ = self.up_proj(x)  # (N, F / ranks)
        out, _ = self.down_proj(self.act_fn(up))
        return out  # (N, C)


class GPTDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = GPTAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GPTMLP(config, vllm_config.quant_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "n"},
        "positions": {0: "n"},
        "intermediate_tensors": {0: "n"},
        "inputs_embeds": {0: "n"},
    },
    enable_if=lambda vllm_config: vllm_config.model_config.hf_config.causal,
)
class GPTModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        group = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        self.embed_positions: nn.Module = PPMissingLayer()
        if group.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: GPTDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm: nn.Module = PPMissingLayer()
        if group.is_last_rank:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.tokens = None
        self.step_limit = vllm_config.scheduler_config.max_num_batched_tokens
        if not config.causal:
            # vLLM wants a layer number in every cache layer's name.
            self.tokens = TokenCache(config.max_position_embeddings, f"{prefix}.tokens.0")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if self.tokens is not None:
            return self._whole_sequences(input_ids)
        if get_pp_group().is_first_rank:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (N, C)
            x = x + self.embed_positions(positions)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(x, None)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)

    def _whole_sequences(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        assert self.tokens is not None
        if input_ids is None:
            raise ValueError("a GPT with causal: false needs token ids: it cannot be given embeddings")
        window = self.tokens(input_ids)
        x = self.embed_tokens(window.input_ids) + self.embed_positions(window.positions)  # (M, C)
        parts, start = [], 0
        for part in window.parts(self.step_limit):
            lengths = window.lengths[part]
            y = x[start : start + sum(lengths)]
            for layer in self.layers:
                y = layer(y, lengths)
            parts.append(y)
            start += len(y)
        return self.norm(torch.cat(parts)[window.rows])  # (N, C)


class GPTForCausalLM(CausalLM):
    body = GPTModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
