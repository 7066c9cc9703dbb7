"""GatorGPT for vLLM: MedAssistGPT under its own name. Loaded in the engine only."""

from modeling.medassist.vllm_model import MedAssistGPTForCausalLM


class GatorGPTForCausalLM(MedAssistGPTForCausalLM):
    """GatorGPT; its head sizes, 48 and 56, are padded where the attention kernel lacks them."""
