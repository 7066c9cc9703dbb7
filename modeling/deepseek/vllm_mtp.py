"""Multi-token prediction for vLLM: the model's own first prediction layer drafts for speculative decoding.

Embedding and head are those of the model that it drafts for; vLLM puts them in. Several tokens are drafted by the same
layer in turn, each from the hidden state that it made for the one before.

Shapes: N tokens, C hidden_size, V vocab_size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.vllm_attention import Rotary, Rows
from modeling.deepseek.vllm_model import DeepseekDecoderLayer, layer_number, mapper
from modeling.layers.vllm_causal_lm import say_cache_size


class SharedHead(nn.Module):
    """The norm before the head."""

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPredictionLayer(DeepseekDecoderLayer):
    """A decoder layer over ``W [RMSNorm(embedding); RMSNorm(previous)]``."""

    def __init__(self, config: MedAssistDeepseekConfig, vllm_config: VllmConfig, prefix: str, number: int) -> None:
        super().__init__(config, vllm_config, prefix, number)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = ReplicatedLinear(
            2 * config.hidden_size, config.hidden_size, bias=False, quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.eh_proj",
        )  # fmt: skip
        self.shared_head = SharedHead(config)

    def predict(self, embedding: Tensor, previous: Tensor, rows: Rows) -> Tensor:
        """What the head takes, (N, C): the next token but one, from the next token's ``embedding`` (N, C)."""
        x, _ = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(previous)), dim=-1))
        x, residual = self(x, None, rows)
        x, _ = self.shared_head.norm(x, residual)
        return x


class DeepseekPredictor(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        number = config.num_hidden_layers
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(number): DeepseekPredictionLayer(config, vllm_config, f"{prefix}.layers.{number}", number)}
        )
        self.rotary = Rotary(config)

    def forward(self, input_ids: Tensor, positions: Tensor, previous: Tensor) -> Tensor:
        (layer,) = self.layers.values()
        assert isinstance(layer, DeepseekPredictionLayer)
        return layer.predict(self.embed_tokens(input_ids), previous, self.rotary(positions))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class MedAssistDeepseekMTP(nn.Module):
    """Has the interface that vLLM asks of models that draft from the hidden states of another."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = DeepseekPredictor(vllm_config=vllm_config, prefix="model")
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.lm_head: nn.Module | None = None  # the model's own, from vLLM
        say_cache_size(vllm_config, f"model.layers.{self.config.num_hidden_layers}.", " for drafting")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``input_ids`` (N,) follow those of the model by one; ``hidden_states`` (N, C) are what it made of them."""
        return self.model(input_ids, positions, hidden_states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the first layer of multi-token prediction, and the embedding.

        Raises:
            ValueError: the checkpoint lacks them.
        """
        number = self.config.num_hidden_layers
        wanted = {
            name: weight
            for name, weight in weights
            if layer_number(name) == number or name == "model.embed_tokens.weight"
        }
        # Published checkpoints repeat embedding and head in the layer.
        copies = (f"model.layers.{number}.embed_tokens.weight", f"model.layers.{number}.shared_head.head.weight")
        for name in copies:
            wanted.pop(name, None)
        if not any(layer_number(name) == number for name in wanted):
            raise ValueError(
                f"the checkpoint has no layer of multi-token prediction (model.layers.{number}): it cannot draft"
            )
        return AutoWeightsLoader(self).load_weights(wanted.items(), mapper=mapper(self.config))
