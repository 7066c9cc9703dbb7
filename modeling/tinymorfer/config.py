"""Configuration of Tinymorfer."""

from typing import Any

from transformers import PreTrainedConfig


class TinymorferConfig(PreTrainedConfig):
    """Sizes and constants of a Tinymorfer language model.

    Args:
        vocab_size: rows of the embedding, which is also the head.
        hidden_size: width of the residual stream; a multiple of ``num_attention_heads``.
        intermediate_size: width of the MLP.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads, of ``hidden_size / num_attention_heads`` each.
        max_position_embeddings: learned positions: the longest sequence, prompt and answer together, in tokens.
        layer_norm_eps: added to the variance, inside the root.
        dropout: probability, applied to what both sublayers add to the residual stream, in training.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: sizes that do not fit together; the message names the fields.
    """

    model_type = "tinymorfer"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if not self.tie_word_embeddings:
            raise ValueError("Tinymorfer's head is its embedding: tie_word_embeddings must be true")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def tiny(cls, **changes: Any) -> "TinymorferConfig":
        """For tests."""
        sizes: dict[str, Any] = dict(
            vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=512, eos_token_id=0,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def base(cls, **changes: Any) -> "TinymorferConfig":
        """Four blocks of the published size (131,840 parameters each) under GPT-2's vocabulary."""
        return cls(**changes)
