"""What vLLM must be told about latent attention and multi-token prediction, in each of its processes."""

from typing import Any

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.vllm_config import DRAFT_TYPE, DRAFTER, kernel_sizes


def register() -> None:
    """Registers the drafting class, the latent cache, and on CPUs the attention over it. Harmless when repeated."""
    from vllm import ModelRegistry
    from vllm.config.speculative import SpeculativeConfig
    from vllm.platforms import current_platform
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    for model_type in (MedAssistDeepseekConfig.model_type, DRAFT_TYPE):
        known = MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, ModelArchConfigConvertorBase)
        if not hasattr(known, "knows_latents"):
            MODEL_ARCH_CONFIG_CONVERTORS[model_type] = _latent(known)
    if DRAFTER not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(DRAFTER, f"modeling.deepseek.vllm_mtp:{DRAFTER}")
    if SpeculativeConfig.hf_config_override is not draft_config:
        _others.append(SpeculativeConfig.hf_config_override)
        SpeculativeConfig.hf_config_override = staticmethod(draft_config)
    if current_platform.is_cpu():
        from modeling.layers import vllm_latent_cpu

        vllm_latent_cpu.register()


_others: list[Any] = []  # vLLM's own function, for all other models


def draft_config(hf_config: Any) -> Any:
    """The configuration of what drafts for a model of ours: its first layer of multi-token prediction.

    vLLM knows by a list of model types whose own weights draft, and has one for DeepSeek's.
    """
    if hf_config.model_type != MedAssistDeepseekConfig.model_type:  # a published V3 is drafted for by vLLM's own class
        return _others[0](hf_config)
    hf_config.model_type = DRAFT_TYPE
    hf_config.update({"n_predict": 1, "architectures": [DRAFTER]})
    return hf_config


def _latent(known: Any) -> Any:
    """The class by which vLLM reads a configuration, taught that ours has a latent cache, and how wide it is."""

    class LatentConvertor(known):
        knows_latents = True

        def is_deepseek_mla(self) -> bool:
            return isinstance(self.hf_config, MedAssistDeepseekConfig) or super().is_deepseek_mla()

        def get_head_size(self) -> int:
            from vllm import envs

            if isinstance(self.hf_config, MedAssistDeepseekConfig):
                return self.hf_config.qk_head_dim if envs.VLLM_MLA_DISABLE else sum(kernel_sizes(self.hf_config))
            return super().get_head_size()

    return LatentConvertor
