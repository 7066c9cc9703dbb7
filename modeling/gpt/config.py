"""Configuration of GPT, and the published sizes."""

from typing import Any

from transformers import PreTrainedConfig


class GPTConfig(PreTrainedConfig):
    """Sizes and constants of a GPT.

    Args:
        vocab_size: rows of the embedding, and of the head, which is another matrix.
        hidden_size: width of the residual stream; a multiple of ``num_attention_heads``.
        intermediate_size: width of the MLP; ``4 * hidden_size`` when not given.
        num_hidden_layers: layers.
        num_attention_heads: attention heads, of ``hidden_size / num_attention_heads`` each; any size, odd ones too.
        max_position_embeddings: learned positions: the longest sequence, prompt and answer together, in tokens.
        layer_norm_eps: added to the variance, inside the root.
        causal: whether a token sees only those before it. The published models were trained with false by a mistake
            (the mask was built and its result dropped): every token sees the whole window, so that each new token
            changes all earlier states, and generation computes the whole window again for each.
        dropout: probability in training, applied to embeddings, attention weights and both sublayers' results.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: sizes that do not fit together; the message names the fields.
    """

    model_type = "gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 256
    layer_norm_eps: float = 1e-5
    causal: bool = True
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.tie_word_embeddings:
            raise ValueError("GPT's head is a matrix of its own: tie_word_embeddings must be false")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def tiny(cls, **changes: Any) -> "GPTConfig":
        """For tests: with the 211M's head size of 45, which no attention kernel takes."""
        sizes: dict[str, Any] = dict(
            vocab_size=160, hidden_size=90, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=512, eos_token_id=0,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def published_155m(cls, **changes: Any) -> "GPTConfig":
        """155,332,608 parameters, head size 64. ``causal=False`` is how the published training really ran."""
        return cls(**(dict(causal=False, dropout=0.1) | changes))

    @classmethod
    def published_211m(cls, **changes: Any) -> "GPTConfig":
        """211,871,700 parameters, head size 45. ``causal=False`` is how the published training really ran."""
        sizes: dict[str, Any] = dict(
            hidden_size=810, num_hidden_layers=18, num_attention_heads=18, max_position_embeddings=512,
            causal=False, dropout=0.2,
        )  # fmt: skip
        return cls(**(sizes | changes))
