"""What every decoder's vLLM class has around its body: head, logits, loading, and the interfaces vLLM asks for."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, WeightsMapper, maybe_prefix
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from modeling.layers import vllm_cpu

logger = init_logger("vllm.medassist")


class CausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant):
    """A body with a head, which is the body's ``embed_tokens`` where the configuration ties them.

    An architecture's class names its ``body`` and how its checkpoint's weights are stacked.

    Attributes:
        body: takes ``vllm_config`` and ``prefix``; has ``embed_input_ids``, ``make_empty_intermediate_tensors`` and a
            ``forward`` of input_ids, positions (N,), intermediate_tensors, inputs_embeds (N, C).
    """

    body: ClassVar[type[Any]]
    model: Any
    lm_head: Any
    hf_to_vllm_mapper: WeightsMapper = WeightsMapper()
    # Adapters of embedding and head are refused: with them vLLM cannot score prompts (``prompt_logprobs``, ``echo``),
    # on which the comparison with the fingerprint rests, and where the two are one matrix their meaning is unclear.
    embedding_modules: ClassVar[dict[str, str]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if current_platform.is_cpu():
            vllm_cpu.mend()
        config = vllm_config.model_config.hf_config
        self.config = config  # vLLM's LoRA manager reads it
        self.model = self.body(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        say_cache_size(vllm_config, prefix)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def say_cache_size(vllm_config: VllmConfig, prefix: str, purpose: str = "") -> None:
    """Logs what a token takes in the paged caches of the layers whose names begin with ``prefix``, on this rank.

    The figure is vLLM's own, from which it makes its blocks.
    """
    layers = vllm_config.compilation_config.static_forward_context
    specs = [
        layer.get_kv_cache_spec(vllm_config)
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase) and name.startswith(prefix)
    ]
    cached = [spec.page_size_bytes // spec.block_size for spec in specs if spec is not None]
    logger.info("KV cache: %d bytes a token%s, in %d layers", sum(cached), purpose, len(cached))
