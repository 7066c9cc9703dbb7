"""Files as the authors of the models publish them, and what those models compute, written from their description.

Nothing here uses the project's models or its table of tensor names: it is what they are compared with.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
PREFIX = "_orig_mod."


@dataclass(frozen=True)
class Sizes:
    """Sizes of a MedAssistGPT or GatorGPT (``ctx`` is ``max_len``), or of a GPT (which has no ``kv``)."""

    vocab: int = 29
    d: int = 24
    heads: int = 6
    kv: int = 3
    ff: int = 20
    layers: int = 3
    ctx: int = 16
    eps: float = 1e-5


def native(s: Sizes, **changes: Any) -> dict[str, Any]:
    """MedAssistGPT's configuration as its trainer keeps it."""
    return dict(
        vocab_size=s.vocab, d_model=s.d, n_heads=s.heads, gqa_groups=s.heads // s.kv, max_len=s.ctx, d_ff=s.ff,
        eps=s.eps, dropout_p=0.0, blocks=s.layers,
    ) | changes  # fmt: skip


def hugging(s: Sizes, **changes: Any) -> dict[str, Any]:
    """MedAssistGPT's configuration as it is uploaded."""
    return dict(
        model_type="medassist_gpt", architectures=["MedAssistGPTForCausalLM"], vocab_size=s.vocab, hidden_size=s.d,
        num_attention_heads=s.heads, num_key_value_heads=s.kv, intermediate_size=s.ff, num_hidden_layers=s.layers,
        max_position_embeddings=s.ctx, layer_norm_eps=s.eps, hidden_dropout=0.0, attention_dropout=0.0,
        torch_dtype="bfloat16",
    ) | changes  # fmt: skip


def gpt_config(s: Sizes, **changes: Any) -> dict[str, Any]:
    return dict(
        vocab_size=s.vocab, context_length=s.ctx, emb_dim=s.d, n_heads=s.heads, n_layers=s.layers, drop_rate=0.1,
        qkv_bias=False,
    ) | changes  # fmt: skip


def medassist(s: Sizes, seed: int = 0, buffers: bool = True, head: str | None = "lm_head") -> State:
    """MedAssistGPT's tensors; ``head="unembed"`` makes it GatorGPT's, None leaves the tied head out."""
    hd = s.d // s.heads
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (s.vocab, s.d), "final_rms.weight": (s.d,)}
    for b in range(s.layers):
        shapes |= {f"blocks.{b}.rms1.weight": (s.d,), f"blocks.{b}.rms2.weight": (s.d,)}
        shapes |= {f"blocks.{b}.attn.q_proj.weight": (s.d, s.d), f"blocks.{b}.attn.o_proj.weight": (s.d, s.d)}
        shapes |= {f"blocks.{b}.attn.{x}_proj.weight": (s.kv * hd, s.d) for x in "kv"}
        shapes |= {f"blocks.{b}.mlp.w1.weight": (2 * s.ff, s.d), f"blocks.{b}.mlp.w2.weight": (s.d, s.ff)}
    state = fill_randomly(shapes, r".*rms.*", seed)
    if buffers:
        for b in range(s.layers):
            for x, width in (("q", s.d), ("k", s.kv * hd)):
                rope = f"blocks.{b}.attn.rope_{x}"
                state[f"{rope}.position_ids"] = torch.arange(s.ctx).reshape(-1, 1)
                state[f"{rope}.div_term"] = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    if head:
        state[f"{head}.weight"] = state["embed.weight"]
    return state


def gpt(s: Sizes, seed: int = 0, buffers: bool = True) -> State:
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (s.vocab, s.d), "pos_emb.weight": (s.ctx, s.d), "out_head.weight": (s.vocab, s.d),
        "final_norm.scale": (s.d,), "final_norm.shift": (s.d,),
    }  # fmt: skip
    for b in range(s.layers):
        block = f"trf_blocks.{b}"
        shapes |= {f"{block}.att.W_{x}.weight": (s.d, s.d) for x in ("query", "key", "value")}
        shapes |= {f"{block}.ff.layers.0.weight": (4 * s.d, s.d), f"{block}.ff.layers.0.bias": (4 * s.d,)}
        shapes |= {f"{block}.ff.layers.2.weight": (s.d, 4 * s.d), f"{block}.ff.layers.2.bias": (s.d,)}
        shapes |= {f"{block}.norm{n}.{x}": (s.d,) for n in (1, 2) for x in ("scale", "shift")}
    state = fill_randomly(shapes, r".*norm.*scale", seed)
    if buffers:
        state |= {f"trf_blocks.{b}.att.mask": torch.ones(s.ctx, s.ctx).triu(1) for b in range(s.layers)}
    return state


def fill_randomly(shapes: Mapping[str, tuple[int, ...]], gains: str, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    # Small enough that float32 rounds the logits to well below the tolerance.
    state = {n: torch.randn(x, generator=generator) / max(3, x[-1] ** 0.5) for n, x in sorted(shapes.items())}
    return {name: 1 + tensor / 3 if re.fullmatch(gains, name) else tensor for name, tensor in state.items()}


def fill_with_sines(state: State, gains: str, ignored: str) -> State:
    """The weights of the golden numbers, see :class:`modeling.reference.Golden`."""
    trained = sorted(n for n in state if not re.fullmatch(ignored, n) and n not in ("lm_head.weight", "unembed.weight"))
    result = dict(state)
    for i, name in enumerate(trained):
        n = torch.arange(state[name].numel(), dtype=torch.float64)
        sine = torch.sin(0.37 * n + 1.1 * (i + 1)).reshape(state[name].shape)
        result[name] = (1 + 0.1 * sine if re.fullmatch(gains, name) else 0.3 * sine).float()
    for head in {"lm_head.weight", "unembed.weight"} & set(state):
        result[head] = result["embed.weight"]
    return result


def medassist_logits(w: State, s: Sizes, ids: list[int]) -> Tensor:
    """(T, V), in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    hd, t = s.d // s.heads, len(ids)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + s.eps).sqrt() * gain

    def turn(x: Tensor) -> Tensor:  # neighbours as complex numbers, over the whole width
        i = torch.arange(x.shape[1] // 2, dtype=torch.float64)
        angles = torch.arange(t)[:, None] * 10000.0 ** (-2 * i / x.shape[1])
        return torch.view_as_real(
            torch.view_as_complex(x.reshape(t, -1, 2)) * torch.polar(angles * 0 + 1, angles)
        ).reshape(t, -1)

    h = w["embed.weight"][ids]
    for b in range(s.layers):
        g = lambda name, b=b: w[f"blocks.{b}.{name}.weight"]  # noqa: E731
        x = norm(h, g("rms1"))
        q, k, v = turn(x @ g("attn.q_proj").T), turn(x @ g("attn.k_proj").T), x @ g("attn.v_proj").T
        heads = []
        for n in range(s.heads):
            kv = n // (s.heads // s.kv)
            mine, shared = slice(n * hd, n * hd + hd), slice(kv * hd, kv * hd + hd)
            scores = q[:, mine] @ k[:, shared].T / math.sqrt(hd)
            heads.append(scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf).softmax(-1) @ v[:, shared])
        h = h + torch.cat(heads, -1) @ g("attn.o_proj").T
        up, gate = (norm(h, g("rms2")) @ g("mlp.w1").T).split(s.ff, -1)
        h = h + (up * gate / (1 + torch.exp(-gate))) @ g("mlp.w2").T
    return norm(h, w["final_rms.weight"]) @ w["embed.weight"].T


def gpt_logits(w: State, s: Sizes, ids: list[int], causal: bool) -> Tensor:
    """(T, V), in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    hd, t = s.d // s.heads, len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + s.eps).sqrt() * w[f"{name}.scale"] + w[f"{name}.shift"]

    h = w["tok_emb.weight"][ids] + w["pos_emb.weight"][:t]
    for b in range(s.layers):
        block = f"trf_blocks.{b}"
        x = norm(h, f"{block}.norm1")
        q, k, v = (x @ w[f"{block}.att.W_{name}.weight"].T for name in ("query", "key", "value"))
        heads = []
        for n in range(s.heads):
            at = slice(n * hd, n * hd + hd)
            scores = q[:, at] @ k[:, at].T / math.sqrt(hd)
            if causal:
                scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, at])
        h = h + torch.cat(heads, -1)
        x = norm(h, f"{block}.norm2") @ w[f"{block}.ff.layers.0.weight"].T + w[f"{block}.ff.layers.0.bias"]
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        h = h + x @ w[f"{block}.ff.layers.2.weight"].T + w[f"{block}.ff.layers.2.bias"]
    return norm(h, "final_norm") @ w["out_head.weight"].T


def prefixed(state: State, prefix: str = PREFIX) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_folder(folder: Path, state: State, config: Any, file: str = "model.safetensors") -> Path:
    """A folder with the weights in the format that the file's name says, and config.json unless that is None."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(folder / "config.json", config)
    if file.endswith(".safetensors"):
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / file)
    else:
        torch.save(state, folder / file)
    return folder


def write_training_dictionary(path: Path, state: State, config: Any, **extras: Any) -> Path:
    """As the trainer saves it: with an optimizer's state, and the configuration inside unless that is None."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    content = dict(step=17, model_state_dict=state, optimizer_state_dict=optimizer.state_dict(),
                   scheduler_state_dict=schedule.state_dict()) | extras  # fmt: skip
    torch.save(content if config is None else content | {"config": config}, path)
    return path


def write_shards(folder: Path, state: State, config: Any, kind: str, parts: int = 3) -> Path:
    """A folder whose weights are spread over several files with an index; ``kind`` is safetensors or bin."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names, files = list(state), {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05}-of-{parts:05}.{kind}"
        chunk = {name: state[name].clone() for name in names[part::parts]}
        (save_file if kind == "safetensors" else torch.save)(chunk, folder / file)
        files |= dict.fromkeys(chunk, file)
    write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {}, "weight_map": files})
    return folder
