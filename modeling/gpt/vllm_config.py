"""What a bidirectional GPT changes in vLLM's settings, and what it cannot be combined with.

vLLM calls it while it builds its configuration, in the API server and in each engine process.
"""

from typing import Any


class ConfigUpdate:
    """Has the interface of vLLM's ``VerifyAndUpdateConfig``."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to do: sizes and dtype are the checkpoint's."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Makes room for whole sequences in a step, and refuses what needs causal attention.

        Raises:
            ValueError: speculative decoding, LoRA or pipeline parallelism with ``causal: false``.
        """
        if vllm_config.model_config.hf_config.causal:
            return
        why = "this GPT's configuration has causal: false: every token sees the whole sequence"
        if vllm_config.speculative_config is not None:
            raise ValueError(
                f"{why}, drafted tokens too, so speculative decoding would change its answers; leave it out"
            )
        if vllm_config.lora_config is not None:
            raise ValueError(
                f"{why} and is computed anew for each, which vLLM's LoRA kernels cannot follow; merge the adapter"
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                f"{why} and is computed anew for each, which pipeline stages cannot pass on; "
                "use --tensor-parallel-size instead of --pipeline-parallel-size"
            )
        from vllm.config import CompilationMode, CUDAGraphMode
        from vllm.logger import init_logger

        longest = vllm_config.model_config.max_model_len
        scheduler = vllm_config.scheduler_config
        # vLLM does not split the prompts of a non-causal model: each must fit into one step.
        scheduler.enable_chunked_prefill = False
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
        # Every step has another number of tokens: there is no graph to reuse.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        init_logger("vllm.medassist").warning(
            "Not causal: no keys and values are kept, each new token computes its whole sequence again (up to %d "
            "tokens of work for one). No torch.compile, no prefix cache, no chunked prefill.",
            longest,
        )
