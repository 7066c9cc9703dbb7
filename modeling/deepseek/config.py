"""Configuration of the DeepSeek-style models, and their sizes."""

import inspect
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

ROUTERS = ("aux_free", "softmax", "noisy_top_k")
ROPE_TYPES = ("default", "linear", "yarn")
# How configurations of others say which router they have: (scoring_func, topk_method) -> ours.
PUBLISHED_ROUTERS = {
    ("sigmoid", "noaux_tc"): "aux_free",
    ("softmax", "greedy"): "softmax",
    ("softmax", "group_limited_greedy"): "softmax",
}
# Settings of published configurations that change nothing here, but for the values that would.
MUST_BE = {"moe_layer_freq": 1, "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1}
# Settings of published configurations about code and training that is not this project's.
MEANINGLESS = ("auto_map", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits")
ROPE_NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "attention_factor")  # fmt: skip
ROPE_SETTINGS = (*ROPE_NUMBERS, "rope_type", "truncate", "partial_rotary_factor")
BETA_FAST, BETA_SLOW = 32, 1  # transformers' defaults for YaRN, which are its paper's


class MedAssistDeepseekConfig(PreTrainedConfig):
    """Sizes and constants. Fields that Hugging Face's ``DeepseekV3Config`` has too are called and default as there.

    Args:
        vocab_size: rows of the embedding, which the multi-token prediction shares.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU of dense layers.
        moe_intermediate_size: width of one expert.
        num_hidden_layers: decoder layers, those of multi-token prediction not counted.
        num_attention_heads: heads; each has keys and values of its own, so ``num_key_value_heads`` is the same.
        q_lora_rank: width of the query latent; None: queries are projected from the residual stream.
        kv_lora_rank: width of the latent that keys and values are made of, which is what the cache holds.
        qk_nope_head_dim: width of a head's query and key that is not rotated.
        qk_rope_head_dim: width of the rotated part, whose key all heads share; 0: no rotary embedding, and the order
            of tokens is known from the causal mask alone.
        v_head_dim: width of a head's value.
        rope_interleave: neighbours ``(2i, 2i + 1)`` form a pair (DeepSeek's); false: ``(j, j + D/2)`` (Llama's).
        rope_parameters: ``{"rope_type": "default" | "linear" | "yarn", "rope_theta": base, ...}``.
        attention_bias: biases on the two down-projections and the output projection.
        router: "aux_free": sigmoid affinities, with a bias for the selection that balances the load without a loss;
            "softmax": with a balancing loss; "noisy_top_k": noise in training, softmax over the chosen
            (:mod:`modeling.deepseek.routing`).
        n_routed_experts: experts to choose from, in each layer.
        num_experts_per_tok: how many of them a token goes to.
        n_shared_experts: experts that every token goes to besides; 0: none.
        n_group, topk_group: experts are in ``n_group`` groups, and chosen from the ``topk_group`` best of them.
        norm_topk_prob: a token's weights are divided by their sum.
        routed_scaling_factor: weights are multiplied by it.
        first_k_dense_replace: so many layers at the start are dense.
        router_aux_loss_coef: weight of the balancing loss in training, of whichever kind the router has.
        router_bias_update_rate: what the selection bias of "aux_free" moves by in an optimizer step.
        num_nextn_predict_layers: layers of multi-token prediction; 0: none.
        mtp_depth: how many further tokens are predicted in training; one for each of those layers unless given. Beyond
            them, the last layer predicts again from what it made for the token before, much as it does when it drafts.
        mtp_loss_weight: weight in training of the mean of the predictions' losses.
        attention_dropout: probability, on attention weights in training.
        max_position_embeddings: the longest sequence, prompt and answer together, in tokens.
        rms_norm_eps: of the residual stream's norms; those of the latents have 1e-6 whatever it says, as in the
            published code.

    Raises:
        ValueError: sizes that do not fit together; the message names the fields. Fields that ``from_pretrained`` is
            given are set in a configuration that is built already: :meth:`check` refuses these.
    """

    model_type = "medassist_deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]
    may_be_zero: ClassVar[tuple[str, ...]] = (
        "qk_rope_head_dim", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "mtp_depth"
    )  # fmt: skip

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    router: str | None = None
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int | None = 1
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    router_aux_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.001
    num_nextn_predict_layers: int = 1
    mtp_depth: int | None = None
    mtp_loss_weight: float = 0.3
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_fixed(kwargs)
        for name in (*MUST_BE, *MEANINGLESS):
            kwargs.pop(name, None)
        self._check_types()
        # A configuration of others is loaded as one of ours: it must not keep their model_type.
        if kwargs.pop("model_type", None) == "deepseek_v2":
            check_v2(self.norm_topk_prob)
            self.num_nextn_predict_layers = 0
        self._translate_router(kwargs.pop("scoring_func", None), kwargs.pop("topk_method", None))
        self.rope_parameters = merged_rope(
            self.rope_parameters, kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None)
        )
        self.check()
        for name in ("head_dim", "qk_head_dim"):  # which configurations of others spell out
            if (given := kwargs.pop(name, None)) not in (None, getattr(self, name)):
                raise ValueError(f"{name} follows from the other widths: it is {getattr(self, name)}, got {given!r}")
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Puts what None stands for in its place, and refuses what does not fit. Fields may have been set since the
        configuration was built; a second call changes nothing.

        Raises:
            ValueError: as when it is built.
        """
        self._check_types()
        self._settle()
        self._check_sizes()
        self._check_attention()
        self._check_experts()
        self._check_rope()

    @property
    def prediction_depth(self) -> int:
        """How many further tokens are predicted in training."""
        return self.num_nextn_predict_layers if self.mtp_depth is None else self.mtp_depth

    @property
    def head_dim(self) -> int:
        """The width that is rotated, which is what ``head_dim`` means in DeepSeek's configurations."""
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_width(self) -> int:
        """Numbers that a layer caches for a token: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted on through those of multi-token prediction, has experts."""
        return layer >= self.first_k_dense_replace

    def active_parameters(self, elements: Mapping[str, int]) -> int:
        """How many parameters a token's way through the model uses: of the routed experts those that it goes to, all of
        the rest with the whole embedding and head, and nothing of multi-token prediction.

        Args:
            elements: tensor name -> number of elements, of the module or of a checkpoint.
        """
        layers = {name: re.search(r"layers\.(\d+)\.", name) for name in elements}
        used = [name for name, match in layers.items() if not match or int(match[1]) < self.num_hidden_layers]
        experts = sum(elements[name] for name in used if ".mlp.experts." in name)
        idle = experts - experts * self.num_experts_per_tok // self.n_routed_experts
        return sum(elements[name] for name in used) - idle

    def _check_types(self) -> None:
        """JSON's ``true`` is an ``int`` of Python's, and a string fails only where it is computed with."""
        for name, annotation in inspect.get_annotations(type(self)).items():
            kinds, value = set(typing.get_args(annotation)) or {annotation}, getattr(self, name, None)
            if typing.get_origin(annotation) is ClassVar:
                continue
            if name == "eos_token_id" and isinstance(value, list) and value and all(map(_is_whole, value)):
                continue
            wanted = ""
            if value is None:
                wanted = "" if type(None) in kinds else "given"
            elif int in kinds and not _is_whole(value):
                wanted = "a whole number" + (" or a list of them" if name == "eos_token_id" else "")
            elif float in kinds and not _is_number(value):
                wanted = "a finite number"
            elif bool in kinds and not isinstance(value, bool):
                wanted = "true or false"
            elif str in kinds and not isinstance(value, str):
                wanted = "a string"
            elif name == "rope_parameters" and not isinstance(value, dict):
                wanted = "a dictionary"
            if wanted:
                raise ValueError(f"{name} must be {wanted}, got {value!r}")

    def _translate_router(self, scoring: str | None, method: str | None) -> None:
        published = published_router(scoring, method)
        if published and self.router not in (None, published):
            self._check_router()
            raise ValueError(
                f"router {self.router!r} contradicts scoring_func and topk_method, which say {published!r}: leave "
                "one out"
            )
        if self.router is None:
            self.router = published
        if method == "greedy":  # the published setting that says that groups do not matter
            self.n_group = self.topk_group = 1

    def _check_router(self) -> None:
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}")

    def _settle(self) -> None:
        if self.router is None:
            self.router = "aux_free"
        self._check_router()
        if self.n_group is None:
            self.n_group = 1
        if self.topk_group is None:
            self.topk_group = self.n_group
        self.n_shared_experts = self.n_shared_experts or 0
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "n_routed_experts",
                     "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (*self.may_be_zero, "router_aux_loss_coef", "router_bias_update_rate", "mtp_loss_weight",
                     "initializer_range"):  # fmt: skip
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must not exceed num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        depth, predictions = self.prediction_depth, self.num_nextn_predict_layers
        if depth < predictions or (depth and not predictions):
            raise ValueError(
                f"mtp_depth ({depth}) must be at least num_nextn_predict_layers ({predictions}), and 0 without any"
            )
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"routed_scaling_factor must be above 0, got {self.routed_scaling_factor}")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"rms_norm_eps must be between 0 and 1, got {self.rms_norm_eps}")

    def _check_attention(self) -> None:
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank must be at least 1, or None for no query latent; got {self.q_lora_rank}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even for rotary embedding, got {self.qk_rope_head_dim}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must be num_attention_heads "
                f"({self.num_attention_heads}): every head's keys and values come from the latent"
            )

    def _check_experts(self) -> None:
        assert self.n_group is not None
        assert self.topk_group is not None
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        if top_k > experts:
            raise ValueError(f"num_experts_per_tok ({top_k}) must not exceed n_routed_experts ({experts})")
        if experts % self.n_group:
            raise ValueError(f"n_routed_experts ({experts}) must be a multiple of n_group ({self.n_group})")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) must not exceed n_group ({self.n_group})")
        size = experts // self.n_group
        if top_k > self.topk_group * size:
            raise ValueError(
                f"num_experts_per_tok ({top_k}) must not exceed the {self.topk_group * size} experts of topk_group "
                f"({self.topk_group}) groups"
            )
        if self.router == "aux_free" and self.n_group > 1 and size < 2:
            raise ValueError(
                f"n_group ({self.n_group}) must leave at least 2 of the n_routed_experts ({experts}) in a group: "
                "groups are ranked by their two best experts"
            )
        if self.router == "noisy_top_k" and (self.n_group > 1 or not self.norm_topk_prob):
            raise ValueError("router 'noisy_top_k' has neither groups nor weights that do not sum to 1: "
                             "n_group must be 1 and norm_topk_prob true")  # fmt: skip

    def _check_rope(self) -> None:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
        rope |= merged_rope(self.rope_parameters)
        if unknown := [name for name in rope if name not in ROPE_SETTINGS]:
            raise ValueError(
                f"rope_parameters.{unknown[0]} is not known; settings are {', '.join(sorted(ROPE_SETTINGS))}"
            )
        if rope["rope_type"] not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters.rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope['rope_type']!r}"
            )
        for name in ROPE_NUMBERS:
            may_be_none = name not in ("rope_theta", "original_max_position_embeddings")
            if name in rope and not _is_number(rope[name]) and not (may_be_none and rope[name] is None):
                raise ValueError(f"rope_parameters.{name} must be a finite number, got {rope[name]!r}")
        if not rope["rope_theta"] > 1:
            raise ValueError(f"rope_parameters.rope_theta must be above 1, got {rope['rope_theta']!r}")
        rope["rope_theta"] = float(rope["rope_theta"])
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"):
            if rope.get(name) is not None and not rope[name] > 0:
                raise ValueError(f"rope_parameters.{name} must be above 0, got {rope[name]!r}")
        for name in ("mscale", "mscale_all_dim"):
            if (rope.get(name) or 0) < 0:
                raise ValueError(f"rope_parameters.{name} must not be negative, got {rope[name]!r}")
        fast, slow = rope.get("beta_fast") or BETA_FAST, rope.get("beta_slow") or BETA_SLOW
        if not fast > slow:
            raise ValueError(f"rope_parameters.beta_fast ({fast}) must exceed rope_parameters.beta_slow ({slow})")
        if not isinstance(rope.get("truncate", True), bool):
            raise ValueError(f"rope_parameters.truncate must be true or false, got {rope['truncate']!r}")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise ValueError("rope_parameters.partial_rotary_factor is not supported: qk_rope_head_dim says how much")
        if rope["rope_type"] != "default":
            if not (rope.get("factor") or 0) >= 1:
                raise ValueError(
                    f"rope_parameters.factor must be at least 1 for rope_type {rope['rope_type']!r}, got "
                    f"{rope.get('factor')!r}"
                )
            if not self.qk_rope_head_dim:
                raise ValueError("qk_rope_head_dim is 0, so rope_parameters.rope_type must be 'default'")
        self.rope_parameters = rope

    @classmethod
    def tiny(cls, **changes: Any) -> "MedAssistDeepseekConfig":
        """For tests: one dense layer, one with 8 experts in 4 groups, and one that predicts a second token."""
        sizes: dict[str, Any] = dict(
            vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, q_lora_rank=48, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
            v_head_dim=24, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
            first_k_dense_replace=1, max_position_embeddings=1056, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        if changes.get("router") == "noisy_top_k":
            sizes |= {"n_group": 1, "topk_group": 1}
        return cls(**(sizes | changes))

    @classmethod
    def demo(cls, **changes: Any) -> "MedAssistDeepseekConfig":
        """What the recipe deepseek-demo trains: 1,174,592 parameters active for a token, of 1,764,416."""
        sizes: dict[str, Any] = dict(
            vocab_size=4096, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
            v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1, n_shared_experts=2,
            routed_scaling_factor=1.0, first_k_dense_replace=1, max_position_embeddings=1024, bos_token_id=None,
            eos_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def base_382m(cls, **changes: Any) -> "MedAssistDeepseekConfig":
        """381,873,152 parameters active for a token, of 1,750,264,832; a token goes to 6 of 64 experts and 2 shared."""
        sizes: dict[str, Any] = dict(
            vocab_size=50281, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512,
            num_hidden_layers=16, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=64,
            qk_rope_head_dim=64, v_head_dim=64, n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1,
            n_shared_experts=2, routed_scaling_factor=1.0, first_k_dense_replace=1, bos_token_id=None,
            eos_token_id=50256,
        )  # fmt: skip
        return cls(**(sizes | changes))


def _is_number(value: Any) -> bool:
    # Python compares whole numbers of any size with a float, and only fails to convert them.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def merged_rope(parameters: Any, scaling: Any = None, theta: Any = None) -> dict[str, Any]:
    """What ``rope_parameters`` says, completed by ``rope_scaling`` and ``rope_theta`` of older configurations.

    ``type`` is another name of ``rope_type``. A ``rope_theta`` that stands in two places must be the same in both:
    programs do not agree on which one counts.

    Raises:
        ValueError: one of them is no dictionary, or two names of one setting contradict each other.
    """
    rope: dict[str, Any] = {}
    for name, settings in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{name} must be a dictionary, got {settings!r}")
        given = dict(settings or {})
        if "type" in given:
            kind = given.pop("type")
            if given.setdefault("rope_type", kind) != kind:
                raise ValueError(
                    f"rope_parameters.rope_type is {given['rope_type']!r}, and {kind!r} by its other name, type: leave "
                    "one out"
                )
        rope |= given
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta {theta!r} contradicts rope_parameters.rope_theta, which is "
                         f"{rope['rope_theta']!r}: leave one out")  # fmt: skip
    return rope


def published_router(scoring: str | None, method: str | None) -> str | None:
    """The router that ``scoring_func`` and ``topk_method`` of a published configuration mean; None if neither is there.

    Raises:
        ValueError: this architecture has no such router.
    """
    if scoring is None and method is None:
        return None
    matches = {r for (s, m), r in PUBLISHED_ROUTERS.items() if scoring in (None, s) and method in (None, m)}
    if not matches:
        raise ValueError(
            f"scoring_func {scoring!r} with topk_method {method!r} is no router of this architecture; router is one of "
            f"{', '.join(ROUTERS)}"
        )
    return matches.pop()


def check_fixed(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a published setting that has one value here has another.
    """
    for name, value in MUST_BE.items():
        if (given := settings.get(name, value)) != value:
            raise ValueError(f"{name} must be {value!r}, got {given!r}: other values are not supported")


def check_v2(normalised: bool | None) -> None:
    """
    Raises:
        ValueError: a DeepSeek-V2 says ``norm_topk_prob``, which transformers ignores for it, and which turns
            ``routed_scaling_factor`` off in DeepSeek's own code.
    """
    if normalised:
        raise ValueError(
            "norm_topk_prob must be false in a deepseek_v2: programs for it do not agree on what true means; if its "
            "weights are to be normalised and then multiplied by routed_scaling_factor, say so with router 'softmax' "
            "in a configuration of medassist_deepseek"
        )
