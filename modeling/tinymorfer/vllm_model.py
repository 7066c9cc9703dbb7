"""Tinymorfer for vLLM: paged KV cache, tensor and pipeline parallelism, LoRA, quantisation, torch.compile.

Loaded in the engine only, through ``serving.plugin``.

Shapes: N tokens of all running requests, C hidden_size, F intermediate_size, H heads of this tensor-parallel rank,
D head_dim.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from modeling.layers.vllm_attention import PagedAttention
from modeling.layers.vllm_causal_lm import CausalLM
from modeling.tinymorfer.config import TinymorferConfig


class TinymorferAttention(nn.Module):
    def __init__(self, config: TinymorferConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise ValueError(
                f"{config.num_attention_heads} attention heads cannot be shared by {ranks} tensor-parallel ranks: "
                "choose a divisor"
            )
        heads = config.num_attention_heads // ranks
        self.qkv_proj = QKVParallelLinear(
            hidden_size=config.hidden_size,
            head_size=config.head_dim,
            total_num_heads=config.num_attention_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=f"{prefix}.o_proj"
        )
        self.attn = PagedAttention(
            heads,
            config.head_dim,
            scale=config.head_dim**-0.5,
            num_kv_heads=heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)  # (N, 3 * H * D)
        q, k, v = qkv.chunk(3, dim=-1)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out  # (N, C)


class TinymorferMLP(nn.Module):
    def __init__(self, config: TinymorferConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.up_proj"
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        up, _ = self.up_proj(x)  # (N, F / ranks)
        out, _ = self.down_proj(self.act_fn(up))
        return out  # (N, C)


class TinymorferBlock(nn.Module):
    """Both sublayers behind the same LayerNorm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = TinymorferAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = TinymorferMLP(config, vllm_config.quant_config, f"{prefix}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(self.norm(x))


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "n"},
        "positions": {0: "n"},
        "intermediate_tensors": {0: "n"},
        "inputs_embeds": {0: "n"},
    }
)
class TinymorferModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        group = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        self.embed_positions: nn.Module = PPMissingLayer()
        if group.is_first_rank or group.is_last_rank:  # the last rank needs it as its head
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        if group.is_first_rank:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: TinymorferBlock(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm: nn.Module = PPMissingLayer()
        if group.is_last_rank:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        if get_pp_group().is_first_rank:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (N, C)
            x = x + self.embed_positions(positions)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        for block in islice(self.layers, self.start_layer, self.end_layer):
            x = block(x)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)


class TinymorferForCausalLM(CausalLM):
    body = TinymorferModel
    # The projection is fused in the checkpoint already. Without this line vLLM would take an adapter's qkv_proj for
    # one of three parts, find none of them, and serve the model without the adapter.
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
