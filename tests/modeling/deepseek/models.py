"""Models for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.model import MedAssistDeepseekForCausalLM


def config(**changes: Any) -> MedAssistDeepseekConfig:
    return MedAssistDeepseekConfig.tiny(**changes)


def module(*, seed: int = 0, **changes: Any) -> MedAssistDeepseekForCausalLM:
    """A tiny model whose weights are large enough that a mistake shows, and small enough that scores, whose rounding
    grows with them, stay within a few units whatever the widths; its selection biases decide choices."""
    torch.manual_seed(seed)
    model = MedAssistDeepseekForCausalLM(config(**changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            gain = parameter.ndim == 1
            parameter.copy_(torch.randn_like(parameter) * (0.15 if gain else parameter.shape[-1] ** -0.5) + gain)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logprobs(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    return model(tokens, **inputs).logits.log_softmax(-1)


def assert_close(got: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
