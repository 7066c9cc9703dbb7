"""What vLLM must be told about latent attention and multi-token prediction, in each of its processes."""

from typing import Any

from modeling.deepseek.config import MedAssistDeepseekConfig

DRAFTER = "MedAssistDeepseekMTP"


def register() -> None:
    """Registers the drafting class, the latent cache, and on CPUs the attention over it. Harmless when repeated."""
    from vllm import ModelRegistry
    from vllm.config.speculative import SpeculativeConfig
    from vllm.platforms import current_platform
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class LatentConvertor(ModelArchConfigConvertorBase):
        def is_deepseek_mla(self) -> bool:
            return True

    MODEL_ARCH_CONFIG_CONVERTORS[MedAssistDeepseekConfig.model_type] = LatentConvertor
    if DRAFTER not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(DRAFTER, f"modeling.deepseek.vllm_mtp:{DRAFTER}")
    if SpeculativeConfig.hf_config_override is not draft_config:
        _others.append(SpeculativeConfig.hf_config_override)
        SpeculativeConfig.hf_config_override = staticmethod(draft_config)  # type: ignore[method-assign]
    if current_platform.is_cpu():
        from modeling.layers import vllm_latent_cpu

        vllm_latent_cpu.register()


_others: list[Any] = []  # vLLM's own function, for all other models


def draft_config(hf_config: Any) -> Any:
    """The configuration of what drafts for a model of ours: its first layer of multi-token prediction.

    vLLM knows by a list of model types whose own weights draft, and has one for DeepSeek's.
    """
    if hf_config.model_type != MedAssistDeepseekConfig.model_type:
        return _others[0](hf_config)
    hf_config.model_type = "deepseek_mtp"
    hf_config.update({"n_predict": 1, "architectures": [DRAFTER]})
    return hf_config
