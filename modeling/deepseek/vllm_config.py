"""What a DeepSeek-style model refuses, by name, when vLLM builds its configuration."""

from typing import Any

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.ranks import check as check_ranks

DRAFTER = "MedAssistDeepseekMTP"
DRAFT_TYPE = "deepseek_mtp"  # vLLM's model_type of DeepSeek's drafting layers
KERNEL_RANK, KERNEL_ROPE = 512, 64  # what vLLM's kernels for latent attention take


class ConfigUpdate:
    """Has the interface of vLLM's ``VerifyAndUpdateConfig``."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Reads the configuration of a published checkpoint as one of ours.

        It is used as it is, with vLLM's ``hf_overrides={"architectures": ["MedAssistDeepseekForCausalLM"]}``.

        Raises:
            ValueError: it has settings that are not supported; the message names them.
        """
        given = model_config.hf_config
        if isinstance(given, MedAssistDeepseekConfig) or given.model_type == DRAFT_TYPE:
            return
        ours = MedAssistDeepseekConfig(**given.to_dict())
        ours.name_or_path = given.name_or_path
        model_config.hf_config = model_config.hf_text_config = ours
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Checks that the sizes can be shared by the ranks and fit vLLM's kernels.

        Raises:
            ValueError: they do not; the message names the fields.
        """
        from vllm.platforms import current_platform

        parallel = vllm_config.parallel_config
        config, ranks = vllm_config.model_config.hf_config.to_dict(), parallel.tensor_parallel_size
        check_ranks(config, ranks, ranks * parallel.data_parallel_size if parallel.enable_expert_parallel else None)
        check_kernels(config, current_platform.is_cpu())
        drafts = vllm_config.speculative_config
        if drafts is not None and drafts.method == "mtp" and drafts.draft_model_config.architecture != DRAFTER:
            raise ValueError(
                "multi-token prediction drafts for imported checkpoints alone: medassist import DIR --out DIR"
            )
        cached = vllm_config.cache_config.cache_dtype
        if current_platform.is_cpu() and cached not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--kv-cache-dtype {cached}: on CPUs latents are cached in the model's dtype, use auto")
        if vllm_config.lora_config is not None:
            raise ValueError("LoRA adapters are not served for models with latent attention; merge the adapter")


def kernel_sizes(config: MedAssistDeepseekConfig) -> tuple[int, int]:
    """Latent and rotary width in the cache: the configuration's on CPUs, elsewhere those of vLLM's kernels.

    Raises:
        ValueError: wider than the kernels.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if current_platform.is_cpu() and AttentionBackendEnum.CPU_MLA.get_class().supports_head_size(rank + rope):
        return rank, rope
    if rank > KERNEL_RANK or rope > KERNEL_ROPE:
        raise ValueError(
            f"kv_lora_rank ({rank}) and qk_rope_head_dim ({rope}) must be at most {KERNEL_RANK} and {KERNEL_ROPE} for "
            "vLLM's kernels; set VLLM_MLA_DISABLE=1 to serve with ordinary attention"
        )
    return KERNEL_RANK, KERNEL_ROPE


def check_kernels(config: dict[str, Any], on_cpu: bool) -> None:
    """Whether vLLM has kernels for the sizes.

    Raises:
        ValueError: the message names the field.
    """
    if on_cpu and config["hidden_size"] % 32:
        raise ValueError(
            f"hidden_size ({config['hidden_size']}) must be a multiple of 32: vLLM's expert kernels for CPUs take no "
            "other"
        )
