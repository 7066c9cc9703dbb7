"""The contenders of the engine benchmark, and the clocks that watch them. Loaded in the session's process only."""

import itertools
import tempfile
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
from vllm.sampling_params import RequestOutputKind

from loadtest.engine_plan import DECODE, DECODE_PROMPT, PREFILL, Cell, Options
from modeling.registry import get

# Prompts are prefilled in steps of this many tokens, as in a server; more where a decode cell's prompts need it, which
# must all get their first token in one step.
STEP_TOKENS = 4096
LOAD_FORMAT = "medassist_random"
# Standard deviation of random matrices, for all contenders: activations stay far from overflow and from denormals.
STD = 0.02


class Clock(Protocol):
    """What is told when the part that counts begins and ends."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class StopWatch:
    """``seconds`` of the wall clock and ``cpu`` seconds of this process with all its threads."""

    seconds = cpu = 0.0

    def start(self) -> None:
        self.seconds, self.cpu = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter()
        self.cpu += time.process_time()


class ProfilerClock:
    """Profiles the part that counts."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def start(self) -> None:
        self.profiler.start()

    def stop(self) -> None:
        self.profiler.stop()

    def operators(self) -> list[tuple[str, float, int]]:
        """Name, milliseconds in the operator itself, calls."""
        return [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in self.profiler.key_averages()]


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Normal matrices, gains of one, biases of zero: no NaN and no denormal anywhere, whatever the architecture."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """Random weights in place, before vLLM packs them for its kernels: no file is written and none is read."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        randomize(model)


class Engine:
    """A vLLM engine of random weights, stepped by hand."""

    def __init__(self, config: Any, options: Options, longest: int, kv_bytes: int, eager: bool) -> None:
        with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as directory:
            config.save_pretrained(directory)
            most = max(options.sequences)
            self.engine = LLM(
                directory,
                load_format=LOAD_FORMAT,
                dtype=options.dtype,
                seed=options.seed,
                max_model_len=longest,
                max_num_seqs=most,
                max_num_batched_tokens=max(STEP_TOKENS, most * DECODE_PROMPT),
                kv_cache_memory_bytes=kv_bytes,
                enable_prefix_caching=False,
                enforce_eager=eager,
                async_scheduling=False,  # a step that runs ahead of its output would blur where decoding begins
                skip_tokenizer_init=True,
                generation_config="vllm",
                distributed_executor_backend="uni",
            ).llm_engine
        self.numbers = itertools.count()

    def play(self, cell: Cell, prompts: list[list[int]], clock: Clock) -> int:
        """Generates, and returns how many tokens the clock saw (see :attr:`Cell.tokens`)."""
        params = SamplingParams(
            temperature=0,
            max_tokens=cell.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        if cell.phase == PREFILL:
            clock.start()
        waiting = set()
        for prompt in prompts:
            waiting.add(name := str(next(self.numbers)))
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        counted = 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if not waiting:
                counted += sum(len(output.outputs[0].token_ids) for output in outputs)
                continue
            waiting.difference_update(output.request_id for output in outputs)
            if not waiting and cell.phase == DECODE:
                clock.start()
        clock.stop()
        return counted if cell.phase == DECODE else cell.tokens


class Generator:
    """``generate()`` of transformers on the torch module, with its KV cache."""

    def __init__(self, config: Any, options: Options, device: str) -> None:
        module = get(config.model_type).model_class()(config)
        randomize(module)
        self.model = module.to(device, getattr(torch, options.dtype)).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def play(self, cell: Cell, prompts: list[list[int]], clock: Clock) -> int:
        ids = torch.tensor(prompts, device=self.model.device)  # (B, T)
        watch = _FirstToken(clock if cell.phase == DECODE else None)
        if cell.phase == PREFILL:
            clock.start()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=cell.new_tokens,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        clock.stop()
        new = out.shape[1] - ids.shape[1]
        return cell.sequences * (new - 1) if cell.phase == DECODE else cell.tokens


class _FirstToken(StoppingCriteria):
    """Never stops anything; starts a clock when every sequence has its first token."""

    def __init__(self, clock: Clock | None) -> None:
        self.clock = clock

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self.clock:
            self.clock.start()
            self.clock = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
