"""Configuration of GatorGPT, and the published sizes."""

from typing import Any

from modeling.medassist.config import MedAssistGPTConfig


class GatorGPTConfig(MedAssistGPTConfig):
    """Sizes of a GatorGPT. Fields and meaning are those of :class:`MedAssistGPTConfig`: the two are one architecture.

    The defaults are those of version 1.
    """

    model_type = "gatorgpt"

    hidden_size: int = 384
    intermediate_size: int = 768
    num_hidden_layers: int = 10
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    rope_layout: str = "flattened"

    @classmethod
    def tiny(cls, **changes: Any) -> "GatorGPTConfig":
        """For tests: with version 1's head size of 48, which few attention kernels take."""
        sizes: dict[str, Any] = dict(
            vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=48, max_position_embeddings=512, eos_token_id=0,
        )  # fmt: skip
        return cls(**(sizes | changes))

    @classmethod
    def published_v1(cls, **changes: Any) -> "GatorGPTConfig":
        """kunjcr2/GatorGPT: 32,587,008 parameters, head size 48."""
        return cls(**changes)

    @classmethod
    def published_v2(cls, **changes: Any) -> "GatorGPTConfig":
        """kunjcr2/GatorGPT2: 40,598,656 parameters, head size 56."""
        return cls(**(dict(hidden_size=448, intermediate_size=896, residual_dropout=0.1) | changes))
