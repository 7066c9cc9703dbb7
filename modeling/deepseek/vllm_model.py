"""DeepSeek-style models for vLLM: latent paged cache, fused experts, tensor, expert and pipeline parallelism.

Loaded in the engine only, through ``serving.plugin``. :mod:`modeling.deepseek.vllm_mtp` drafts for it.

Shapes: N tokens of all running requests, C hidden_size.
"""

import re
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.vllm_attention import DeepseekAttention, Rotary, Rows
from modeling.deepseek.vllm_moe import DeepseekMLP, DeepseekMoE
from modeling.layers.vllm_causal_lm import CausalLM

MAPPER = WeightsMapper(
    orig_to_new_substr={".noise_weight": None},  # noise is for training
    orig_to_new_stacked={
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
        ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
        ".q_a_proj": (".fused_qkv_a_proj", 0),
        ".kv_a_proj_with_mqa": (".fused_qkv_a_proj", 1),
    },
)
# Without a query latent there is nothing to stack.
MAPPER_PLAIN_QUERIES = WeightsMapper(
    orig_to_new_substr=MAPPER.orig_to_new_substr,
    orig_to_new_stacked={k: v for k, v in MAPPER.orig_to_new_stacked.items() if "_a_proj" not in k},
)


def mapper(config: MedAssistDeepseekConfig) -> WeightsMapper:
    """From the checkpoint's names to those of the classes here."""
    return MAPPER_PLAIN_QUERIES if config.q_lora_rank is None else MAPPER


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor of the checkpoint belongs to."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


class DeepseekDecoderLayer(nn.Module):
    """``config`` is given because a drafting layer has it from another place."""

    def __init__(self, config: MedAssistDeepseekConfig, vllm_config: VllmConfig, prefix: str, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DeepseekAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.is_sparse(number):
            self.mlp: nn.Module = DeepseekMoE(config, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = DeepseekMLP(
                config.hidden_size, config.intermediate_size, vllm_config.quant_config, f"{prefix}.mlp"
            )

    def forward(self, x: Tensor, residual: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        # vLLM's RMSNorm adds to the residual and normalises in one kernel.
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, rows)
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
class MedAssistDeepseekModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        group = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if group.is_first_rank or (group.is_last_rank and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DeepseekDecoderLayer(config, vllm_config, prefix, int(prefix.rpartition(".")[2])),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if group.is_last_rank else PPMissingLayer()
        self.rotary = Rotary(config)
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
        rows = self.rotary(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(x, residual, rows)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


class MedAssistDeepseekForCausalLM(CausalLM):
    body = MedAssistDeepseekModel

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads all but the layers of multi-token prediction."""
        self.hf_to_vllm_mapper = mapper(self.config)
        layers = self.config.num_hidden_layers
        own = ((name, w) for name, w in weights if (number := layer_number(name)) is None or number < layers)
        return super().load_weights(own)
