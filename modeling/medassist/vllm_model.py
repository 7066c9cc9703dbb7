"""MedAssistGPT for vLLM: paged KV cache, tensor and pipeline parallelism, LoRA, quantisation, torch.compile.

Loaded in the engine only, through ``serving.plugin``. Reads the checkpoint directory as it is: the weights of
``q_proj``, ``k_proj``, ``v_proj`` and of ``gate_proj``, ``up_proj`` are stacked on the way in.

Keys are cached after rotation, so prefix caching, chunked prefill and pipeline parallelism need nothing special even
in the flattened layout, whose scores depend on absolute positions.

Shapes: N tokens of all running requests, C hidden_size, F intermediate_size, H query heads, K key/value heads and
D head_dim of this tensor-parallel rank.
"""

from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from modeling.layers.vllm_attention import PagedAttention
from modeling.layers.vllm_causal_lm import CausalLM
from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.vllm_rotary import FlattenedRotary, PerHeadRotary, rotary, vllms_kernel_is_exact


class MedAssistAttention(nn.Module):
    def __init__(
        self,
        config: MedAssistGPTConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        assert config.head_dim is not None
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_attention_heads // ranks
        self.num_kv_heads = max(1, config.num_key_value_heads // ranks)
        self.q_size = self.num_heads * config.head_dim
        self.kv_size = self.num_kv_heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size=config.hidden_size,
            head_size=config.head_dim,
            total_num_heads=config.num_attention_heads,
            total_num_kv_heads=config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            input_size=config.num_attention_heads * config.head_dim,
            output_size=config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = None
        self.rotate = FlattenedRotary.rotate if config.rope_layout == "flattened" else PerHeadRotary.rotate
        if vllms_kernel_is_exact(config):
            self.rotary_emb = get_rope(
                config.head_dim,
                max_position=config.max_position_embeddings,
                rope_parameters=config.rope_parameters,
                is_neox_style=True,
            )
        self.attn = PagedAttention(
            self.num_heads,
            config.head_dim,
            scale=config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor, rope_rows: tuple[Tensor, ...] | None) -> Tensor:
        qkv, _ = self.qkv_proj(x)  # (N, (H + 2K) * D)
        if rope_rows is None:
            assert self.rotary_emb is not None
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
            q, k = self.rotary_emb(positions, q, k)
        else:
            qk, v = qkv.split([self.q_size + self.kv_size, self.kv_size], dim=-1)
            q, k = self.rotate(qk, rope_rows).split([self.q_size, self.kv_size], dim=-1)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out  # (N, C)


class MedAssistMLP(nn.Module):
    def __init__(self, config: MedAssistGPTConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)  # (N, 2F)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out  # (N, C)


class MedAssistDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MedAssistAttention(config, vllm_config.cache_config, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MedAssistMLP(config, quant_config, f"{prefix}.mlp")

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None, rope_rows: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor]:
        # vLLM's RMSNorm adds to the residual and normalises in one kernel.
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x, rope_rows)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "n"},
        "positions": {0: "n"},
        "intermediate_tensors": {0: "n"},
        "inputs_embeds": {0: "n"},
    }
)
class MedAssistGPTModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        group = get_pp_group()
        if group.is_first_rank or group.is_last_rank:  # the last rank needs it as its head
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: MedAssistDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if group.is_last_rank else PPMissingLayer()
        self.rotary = None if vllms_kernel_is_exact(config) else rotary(config)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
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
            residual = None
        else:
            assert intermediate_tensors is not None
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        rope_rows = self.rotary.rows(positions) if self.rotary is not None else None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual, rope_rows)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


class MedAssistGPTForCausalLM(CausalLM):
    body = MedAssistGPTModel
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
