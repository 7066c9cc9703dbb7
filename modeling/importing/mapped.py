"""A model whose weights stay in their file, so that running it takes the memory of its largest tensor."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from modeling.importing.weights import release
from modeling.registry import Architecture


def load_mapped(arch: Architecture, config: Any, file: Path) -> Any:
    """The model of a float32 checkpoint, in evaluation mode, for a few forward passes.

    Parameters are views of the mapped file; after each module's turn their pages are given back, and read again at its
    next. Writing to them is not possible.
    """
    model_class = arch.model_class()
    with torch.device("meta"):
        model = model_class(config).eval()
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        model.load_state_dict({name: weights.get_tensor(name) for name in names}, strict=False, assign=True)
    model.tie_weights()
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        # A buffer that only the constructor computes: there is no way but to build the model in memory.
        return model_class.from_pretrained(file.parent, dtype=torch.float32).eval()
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(_give_back)
    return model


def _give_back(module: nn.Module, inputs: Any, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        release(parameter.detach())
