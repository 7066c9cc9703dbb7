"""Configuration of MedAssistGPT, and the published sizes."""

from typing import Any

from transformers import PreTrainedConfig

ROPE_LAYOUTS = ("per_head", "flattened")


class MedAssistGPTConfig(PreTrainedConfig):
    """Sizes and constants of a MedAssistGPT. Field names are Llama's, so that tools for Llama know them.

    Args:
        vocab_size: rows of the embedding, which is also the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU's gate and up projections.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; each serves ``num_attention_heads / num_key_value_heads`` query heads.
        head_dim: width of one head; ``hidden_size / num_attention_heads`` when not given.
        max_position_embeddings: the longest sequence, prompt and answer together, in tokens.
        rms_norm_eps: added to the mean square, inside the root.
        rope_layout: ``"per_head"`` (Llama's) or ``"flattened"`` (the published checkpoints'), see
            :mod:`modeling.layers.rope`.
        rope_parameters: ``{"rope_type": "default", "rope_theta": base}``.
        residual_dropout: probability, applied to what attention and MLP add to the residual stream, in training.
        initializer_range: standard deviation of the initial weights.
        eos_token_id: end of text; ids of the published tokenizer (p50k_base) unless given.

    Raises:
        ValueError: sizes that do not fit together; the message names the fields.
    """

    model_type = "medassist_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50281
    hidden_size: int = 1024
    intermediate_size: int = 2560
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_layout: str = "per_head"
    rope_parameters: dict[str, Any] | None = None
    residual_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) unless head_dim is given"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.rope_layout not in ROPE_LAYOUTS:
            raise ValueError(f"rope_layout must be one of {', '.join(ROPE_LAYOUTS)}, got {self.rope_layout!r}")
        if not self.tie_word_embeddings:
            raise ValueError("MedAssistGPT's head is its embedding: tie_word_embeddings must be true")
        if "rope_theta" in kwargs:  # where older configurations keep it
            self.rope_parameters = {"rope_theta": kwargs.pop("rope_theta")} | (self.rope_parameters or {})
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0} | (self.rope_parameters or {})
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"rope_parameters.rope_type {self.rope_parameters['rope_type']!r} is not supported: "
                "MedAssistGPT has no context extension, use 'default'"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def tiny(cls, **changes: Any) -> "MedAssistGPTConfig":
        """For tests; its head size (32) is the smallest that vLLM's CPU attention takes."""
        sizes: dict[str, Any] = dict(
            vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, eos_token_id=0,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def demo(cls, **changes: Any) -> "MedAssistGPTConfig":
        """The size of the checkpoint shipped with the project: about 1 million parameters."""
        sizes: dict[str, Any] = dict(
            vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=0,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def published_73m(cls, **changes: Any) -> "MedAssistGPTConfig":
        """The first draft, called "500M": 72,930,304 parameters, GPT-2's vocabulary."""
        return cls(**(dict(vocab_size=50257, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                           num_attention_heads=8, rope_layout="flattened") | changes))  # fmt: skip

    @classmethod
    def published_86m(cls, **changes: Any) -> "MedAssistGPTConfig":
        """kunjcr2/MedAssistGPT: 86,578,176 parameters."""
        return cls(**(dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=16,
                           rope_layout="flattened") | changes))  # fmt: skip

    @classmethod
    def published_259m(cls, **changes: Any) -> "MedAssistGPTConfig":
        """259,155,968 parameters."""
        return cls(**(dict(intermediate_size=2048, num_attention_heads=32, rope_layout="flattened") | changes))

    @classmethod
    def published_303m(cls, **changes: Any) -> "MedAssistGPTConfig":
        """Published as "401M"; it has 303,196,160 parameters."""
        return cls(**(dict(rope_layout="flattened") | changes))
