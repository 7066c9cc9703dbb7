"""What a token costs: floating-point operations, the peaks they are measured against, and memory.

Model FLOPs of a token in training, forward and backward, by the convention of PaLM (Chowdhery et al. 2022, appendix B):

    6 * elements of the matrices it is multiplied by  +  6 * heads * (qk width + value width) * window, each layer

The second term is PaLM's ``12 * layers * heads * head_dim * window`` where queries, keys and values have one width. It
is not halved for causality, whatever the attention's kernel leaves out, and takes the window as one document. Of routed
experts a token meets ``num_experts_per_tok``; layers of multi-token prediction count as often as they run, and the head
once more each time. Looking up an embedding costs nothing; a tied embedding counts as the head it also is. Norms,
activations and the optimizer are left out, and so is what activation checkpointing computes again: these are the
model's FLOPs, not the hardware's. Every token is taken to reach the head: where the loss is on answers alone, fewer do,
and the figure is too high by that.
"""

import re
from typing import Any, NamedTuple

# Dense bfloat16 with float32 accumulation, in FLOP/s, from the makers' data sheets, which like to print the double:
# the figure for matrices half of which are zeros. Cards without bfloat16 (V100, T4) are not here. Names are parts of
# ``torch.cuda.get_device_name()``; the longest that is in it counts.
PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "RTX A6000": 154.8e12,
    "H100": 989.4e12,  # SXM, whose name is "NVIDIA H100 80GB HBM3"
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H800": 989.4e12,
    "H800 PCIe": 756e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 3090": 71e12,
    "RTX 3090 Ti": 80e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307.4e12,
}


class Matrix(NamedTuple):
    """A matrix that a token is multiplied by ``times`` times in a step's forward pass.

    Attributes:
        layer: its number in ``model.layers``; None for the head.
    """

    inputs: int
    outputs: int
    times: int
    layer: int | None


def matrices(model: Any) -> list[Matrix]:
    """All matrices that a token meets in training; a stack of experts is one, met ``num_experts_per_tok`` times.

    Args:
        model: a causal language model of the registry, on any device ("meta" too).
    """
    config, found = model.config, []
    for module_name, module in model.named_modules():
        if hasattr(module, "num_embeddings"):  # rows are looked up
            continue
        number = re.search(r"\blayers\.(\d+)\b", module_name)
        layer = int(number[1]) if number else None
        runs = _runs(config, layer)
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:
                found.append(Matrix(weight.shape[2], weight.shape[1], runs * config.num_experts_per_tok, layer))
            elif weight.ndim == 2:
                found.append(Matrix(weight.shape[1], weight.shape[0], runs, layer))
    return found


def _runs(config: Any, layer: int | None) -> int:
    """How often a layer runs for a token: once, but for those of multi-token prediction, of which the last is run again
    until ``prediction_depth`` is reached. The head (None) runs for the model and for each prediction."""
    depth = getattr(config, "prediction_depth", 0)
    if layer is None:
        return 1 + depth
    predictions = getattr(config, "num_nextn_predict_layers", 0)
    if predictions and layer == config.num_hidden_layers + predictions - 1:
        return 1 + depth - predictions
    return 1


def attention_width(config: Any) -> int:
    """Width of all heads' queries plus that of all their values; latent attention's are not the same."""
    qk = getattr(config, "qk_head_dim", config.head_dim)
    return config.num_attention_heads * (qk + getattr(config, "v_head_dim", config.head_dim))


def flops_per_token(model: Any, window: int) -> float:
    """Forward and backward, as the module's docstring counts them.

    Args:
        model: a causal language model of the registry, on any device ("meta" too).
        window: tokens a window.
    """
    products = sum(m.inputs * m.outputs * m.times for m in matrices(model))
    layers = range(model.config.num_hidden_layers + getattr(model.config, "num_nextn_predict_layers", 0))
    runs = sum(_runs(model.config, layer) for layer in layers)
    return 6.0 * products + 6.0 * runs * attention_width(model.config) * window


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU in FLOP/s by ``torch.cuda.get_device_name()``; None: not known here."""
    named = [name for name in PEAKS if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_name)]
    return PEAKS[max(named, key=len)] if named else None


def memory_estimate(
    model: Any,
    *,
    optimizer: str,
    windows: int,
    window: int,
    precision: str = "float32",
    activation_checkpointing: bool = False,
    loss_chunk: int = 0,
    ranks: int = 1,
) -> dict[str, int]:
    """Bytes that a rank needs at the peak of a step, by what they are for; a rough guide, and an honest one about what
    it leaves out: the allocator's waste, the libraries' own workspaces, and the attention's where it has no fused
    kernel.

    Weights are float32, and so are gradients; AdamW keeps 8 bytes a parameter, Muon 4 for each that is in a layer's
    matrix. All of that is divided over ``ranks``. What autograd keeps of a window is taken as the inputs and outputs
    of every matrix, at the size of ``precision``; with activation checkpointing each layer's input, and one layer in
    full. Autocast keeps copies of the matrices besides.

    Args:
        model: a causal language model of the registry, on any device ("meta" too).
        optimizer: "adamw" or "muon".
        windows: windows a micro-batch on one rank.
        window: tokens a window.
        precision: "float32" or "bfloat16" (autocast).
        loss_chunk: tokens whose logits exist at once; 0: all of a micro-batch, and those of every prediction.
        ranks: among which weights, gradients and optimizer states are divided; 1 unless sharded (FSDP).
    """
    met, config = matrices(model), model.config
    parameters = dict(model.named_parameters())
    elements = sum(p.numel() for p in parameters.values())
    in_layers = sum(p.numel() for name, p in parameters.items() if p.ndim > 1 and ".layers." in f".{name}")
    states = 8 * elements - (4 * in_layers if optimizer == "muon" else 0)
    size, tokens = (2 if precision == "bfloat16" else 4), windows * window
    of_layer: dict[int, int] = {}
    for m in met:
        if m.layer is not None:
            of_layer[m.layer] = of_layer.get(m.layer, 0) + (m.inputs + m.outputs) * m.times * size * tokens
    activations = sum(of_layer.values())
    if activation_checkpointing:
        inputs = sum(_runs(config, layer) for layer in of_layer) * config.hidden_size * 4 * tokens
        activations = inputs + max(of_layer.values())
    rows = min(loss_chunk, tokens) if loss_chunk else tokens * _runs(config, None)
    copies = sum(p.numel() for p in parameters.values() if p.ndim > 1) if precision == "bfloat16" else 0
    parts = {
        "weights": 4 * elements // ranks,
        "gradients": 4 * elements // ranks,
        "optimizer": states // ranks,
        "bfloat16_copies": 2 * copies // ranks,
        "activations": activations,
        "logits": 2 * 4 * rows * config.vocab_size,  # they and their gradient, in float32
    }
    return parts | {"total": sum(parts.values())}
