"""DeepSeek-style models as a trainable torch module, usable through Hugging Face's auto classes and ``generate()``.

    h = E[ids];  per layer:  h += MLA(RMSNorm(h));  h += FFN(RMSNorm(h));  logits = W RMSNorm(h)

FFN is a SwiGLU in the first ``first_k_dense_replace`` layers and a mixture of experts in the others. With
``router="aux_free"`` the module computes exactly what ``DeepseekV3ForCausalLM`` does with the same weights, with
"softmax" what ``DeepseekV2ForCausalLM`` does, and it reads and writes their tensor names.

Multi-token prediction (DeepSeek-V3, section 2.2): depth d has one more layer, which sees at position i what depth d - 1
made of it and the embedding of the d-th token after it, and predicts the token after that. Embedding and head are the
model's own. These layers come after the others in ``model.layers``, as in published checkpoints; ``forward`` does not
run them.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, V vocab_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling.deepseek import losses
from modeling.deepseek.attention import LatentAttention, rope_cos_sin
from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.experts import MLP, Experts, MixtureOfExperts, Router, Routing
from modeling.deepseek.routing import moved
from modeling.layers.decoding import CausalLMHead, begin
from modeling.layers.objective import IGNORED, Batch, Objective, count
from modeling.layers.tensor_plan import TensorPlan

Rope = tuple[Tensor, Tensor]

# Checkpoints have a matrix for each expert, the module stacks them: the same mapping as DeepseekV3's, which shares it
# with the model of this name.
register_checkpoint_conversion_mapping(
    MedAssistDeepseekConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)


@dataclass
class DeepseekOutput(BaseModelOutputWithPast):
    """``routing``: what each layer's router did, by the layer's number; dense layers have none. ``mask``: the causal
    mask that the layers had."""

    routing: dict[int, Routing] | None = None
    mask: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: MedAssistDeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        sparse = config.is_sparse(layer_idx)
        self.mlp = MixtureOfExperts(config) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)  # (B, T, C)
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + y, routing


class SharedHead(nn.Module):
    """The norm before the head of a prediction; the head is the model's own."""

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PredictionLayer(DecoderLayer):
    """One depth of multi-token prediction: ``DecoderLayer(W [RMSNorm(embedding); RMSNorm(previous)])``."""

    def __init__(self, config: MedAssistDeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(self, embedding: Tensor, previous: Tensor, rope: Rope, mask: Tensor | None) -> tuple[Tensor, Routing]:
        """The hidden state of this depth (B, T, C), from the next token's ``embedding`` and the depth before."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(previous)), dim=-1))
        x, routing = self(x, rope, mask, None)
        return x, routing


class MedAssistDeepseekPreTrainedModel(PreTrainedModel):
    config_class = MedAssistDeepseekConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer", "PredictionLayer"]
    # A bias that moves by 0.001 a step cannot be kept in bfloat16.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # Published checkpoints have copies of embedding and head in each layer of multi-token prediction.
    _keys_to_ignore_on_load_unexpected = [
        r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",
        r"rotary_emb\.inv_freq",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
            if self.config.router == "aux_free":
                nn.init.zeros_(module.e_score_correction_bias)
            if self.config.router == "noisy_top_k":
                nn.init.zeros_(module.noise_weight)


class MedAssistDeepseekModel(MedAssistDeepseekPreTrainedModel):
    """Embedding, decoder layers (those of multi-token prediction last) and the final norm."""

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        config.check()  # it may have been changed since it was built, as from_pretrained does
        super().__init__(config)
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        depths = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
        self.layers = nn.ModuleList(
            [DecoderLayer(c, i) for i in range(c.num_hidden_layers)] + [PredictionLayer(c, i) for i in depths]
        )
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
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
    ) -> DeepseekOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not self.training
        positions, mask, cache = begin(self.config, x, attention_mask, position_ids, past_key_values, use_cache)
        rope = rope_cos_sin(self.config, positions)
        made = {}
        for number, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            x, routing = layer(x, rope, mask, cache)
            if routing is not None:
                made[number] = routing
        return DeepseekOutput(last_hidden_state=self.norm(x), past_key_values=cache, routing=made, mask=mask)

    def predict(
        self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None
    ) -> tuple[list[Tensor], dict[int, Routing]]:
        """The hidden states of multi-token prediction for whole sequences.

        Args:
            hidden: (B, T, C), the model's, after its final norm.
            input_ids, position_ids: (B, T), what ``hidden`` was made from.
            mask: (B, 1, T, T) or None, as it was made with.

        Returns:
            For each depth d (from 1) a (B, T, C), ready for the head: position i predicts token i + d + 1. The last d
            positions of a row have no d-th token after them, and what stands there means nothing. Then, what the
            layers' routers did.
        """
        rope = rope_cos_sin(self.config, position_ids)
        results: list[Tensor] = []
        made: dict[int, Routing] = {}
        first, last = self.config.num_hidden_layers, len(self.layers) - 1
        for depth in range(1, self.config.prediction_depth + 1):
            number = min(first + depth - 1, last)
            layer = self.layers[number]
            assert isinstance(layer, PredictionLayer)
            following = F.pad(input_ids[:, depth:], (0, min(depth, input_ids.shape[1])))  # (B, T)
            hidden, routing = layer.predict(self.embed_tokens(following), hidden, rope, mask)
            # The next depth gets what this one's head gets, as the first depth does: one layer can then draft several
            # tokens in turn. (A drafting engine recycles the newest position alone, with the first depth's keys for
            # those before it: what is trained here comes near that, and is not the same.)
            hidden = layer.shared_head.norm(hidden)
            results.append(hidden)
            if routing is not None:
                made.setdefault(number, routing)  # a layer that predicts again is balanced by its first time
        return results, made


class MedAssistDeepseekForCausalLM(CausalLMHead, MedAssistDeepseekPreTrainedModel, GenerationMixin):
    """The model with its head, which may be the embedding; ``forward`` is :class:`CausalLMHead`'s."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Most weights are the experts'; the rest is every rank's.
    tensor_plan = TensorPlan(modules={"model.layers.*.mlp.experts": "expert"}, divided=("n_routed_experts",))

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__(config)
        self.model = MedAssistDeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def loss_weights(self) -> dict[str, float]:
        """The language model's loss, those of the predictions (``mtp_loss_1`` is of the token after the next) and the
        balancing loss, per window and layer."""
        c = self.config
        weights = super().loss_weights
        weights |= {name: c.mtp_loss_weight / len(self._predictions()) for name in self._predictions()}
        return weights | ({"balance_loss": c.router_aux_loss_coef} if self._has_balance_loss() else {})

    def loss_counts(self, batch: Batch) -> dict[str, int]:
        counts = super().loss_counts(batch)
        for depth, name in enumerate(self._predictions(), 1):
            counts[name] = count(losses.later_labels(batch.labels, batch.position_ids, depth))
        return counts | ({"balance_loss": batch.input_ids.shape[0]} if self._has_balance_loss() else {})

    def objective(self, batch: Batch) -> Objective:
        """Sums of all losses, and the load of every expert."""
        return self._objective(batch, *self._hidden_states(batch))

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, tuple[float, int]]:
        """The parts of the loss, and "mtp_agreement_1" (of the token after the next) and so on: the share of tokens for
        which a prediction's best is the model's own best, which has seen all tokens before. It foretells how many
        drafts greedy decoding accepts, of the first place exactly, of later ones roughly."""
        hidden, predicted, routings = self._hidden_states(batch)
        counts, sums = self.loss_counts(batch), self._objective(batch, hidden, predicted, routings).sums
        measured = {name: (float(value), counts[name]) for name, value in sums.items()}
        for depth, draft in enumerate(predicted, 1):
            where = losses.later_labels(batch.labels, batch.position_ids, depth) != IGNORED
            own = self.lm_head(hidden[where.roll(depth, 1)]).argmax(-1)  # the same tokens, predicted from before them
            agreed = (self.lm_head(draft[where]).argmax(-1) == own).sum()
            measured[f"mtp_agreement_{depth}"] = (float(agreed), len(own))
        return measured

    def _hidden_states(self, batch: Batch) -> tuple[Tensor, list[Tensor], dict[int, Routing]]:
        """Hidden states for the head, of the model and of each depth of prediction, and what the routers did."""
        out = self.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        predicted, made = self.model.predict(out.last_hidden_state, batch.input_ids, batch.position_ids, out.mask)
        return out.last_hidden_state, predicted, out.routing | made

    def _objective(
        self, batch: Batch, hidden: Tensor, predicted: list[Tensor], routings: dict[int, Routing]
    ) -> Objective:
        router = self.config.router
        sums = self.language_losses(hidden, batch.labels)
        for depth, (name, later) in enumerate(zip(self._predictions(), predicted, strict=True), 1):
            sums[name] = self.summed_loss(later, losses.later_labels(batch.labels, batch.position_ids, depth))
        if not routings:
            return Objective(sums)
        if self._has_balance_loss():
            parts = [losses.balance_loss(routing, router, batch.is_text) for routing in routings.values()]
            sums["balance_loss"] = torch.stack(parts).sum()
        return Objective(sums, losses.routing_statistics(routings, router, batch.is_text))

    @torch.no_grad()
    def after_step(self, statistics: dict[str, Tensor]) -> dict[str, Any]:
        """Moves the selection biases against the step's load, and says how the experts were used."""
        if not statistics:
            return {}
        load = statistics["load"]  # (layers, E)
        if self.config.router == "aux_free":
            for layer_load, gate in zip(load, self.routers(), strict=True):
                bias = gate.e_score_correction_bias
                bias.copy_(moved(bias, layer_load.to(bias.device), self.config.router_bias_update_rate))
        entropy = statistics["entropy"] / statistics["tokens"].clamp(min=1)
        share = load / load.sum(-1, keepdim=True).clamp(min=1)
        return {
            "expert_load_cv": losses.coefficient_of_variation(load).tolist(),
            "router_entropy": entropy.tolist(),
            "expert_load": share.tolist(),
        }

    def routers(self) -> list[Router]:
        """The routers of all layers that have one, in the order of the layers."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def _predictions(self) -> list[str]:
        return [f"mtp_loss_{depth + 1}" for depth in range(self.config.prediction_depth)]

    def _has_balance_loss(self) -> bool:
        return bool(self.config.router_aux_loss_coef) and bool(self.routers())
