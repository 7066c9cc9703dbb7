"""The model card: ``README.md`` of a checkpoint directory, made of what the run recorded and measured."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.trackers import read


def write_card(
    directory: Path,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    metrics: Path,
    manifests: Mapping[str, Mapping[str, Any]] | None = None,
    sources: Sequence[str] = (),
    evaluation: Mapping[str, float] | None = None,
    license: str = "",
    repo: str = "",
) -> Path:
    """Writes the card and returns its path. It states only what was recorded: what is missing has no line.

    Args:
        directory: a checkpoint directory, with ``curves.png`` if the card is to show it.
        recipe: the run's, resolved.
        environment: of :func:`training.environment.describe`.
        metrics: the run's ``metrics.jsonl``.
        manifests: split ("train", ...) -> its manifest (:mod:`training.shards`).
        sources: what the text is, a name each. Paths are not named: they are the machine's own business.
        evaluation: name of a task and metric -> score.
        license: of the weights, as the Hub spells it ("apache-2.0"); empty: none is stated.
        repo: where it is uploaded to, for the commands.
    """
    config = json.loads((directory / "config.json").read_text())
    parameters = count_parameters(directory)
    name = repo.rpartition("/")[2] or str(recipe.get("name", directory.name))
    rows = read(metrics)
    parts = [
        _front_matter(config, license),
        f"# {name}",
        _summary(config, parameters),
        _architecture(config, parameters, directory),
        _data(manifests or {}, sources),
        _training(recipe, environment, rows),
        _figures(recipe, rows, evaluation or {}),
        "## Curves\n\n![Loss and other figures of the training run](curves.png)"
        if (directory / "curves.png").exists()
        else "",
        _use(repo or "DIRECTORY"),
        _limits(parameters, _of(manifests or {}, "train", "tokens")),
    ]
    path = directory / "README.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def count_parameters(directory: Path) -> int:
    """Elements of all tensors, from the headers of the weight files; a tied head is in them once."""
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
    return total


def _front_matter(config: Mapping[str, Any], license: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if license:
        lines.append(f"license: {json.dumps(license)}")
    lines += ["tags:", "- medassist", f"- {json.dumps(config['model_type'])}", "- vllm", "---"]
    return "\n".join(lines)


def _summary(config: Mapping[str, Any], parameters: int) -> str:
    return (
        f"A language model of {parameters:,} parameters with the architecture `{config['model_type']}`, trained from "
        "scratch with medassist."
    )


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    given = [(name, value) for name, value in rows if value not in (None, "")]
    if not given:
        return ""
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in given)


def _architecture(config: Mapping[str, Any], parameters: int, directory: Path) -> str:
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return _table(
        "Architecture",
        [
            ("class", f"`{config['architectures'][0]}`"),
            ("parameters", f"{parameters:,}"),
            ("layers", config.get("num_hidden_layers")),
            ("width", config.get("hidden_size")),
            ("attention heads", config.get("num_attention_heads")),
            ("key/value heads", config.get("num_key_value_heads")),
            ("experts a layer", config.get("n_routed_experts")),
            ("experts a token", config.get("num_experts_per_tok")),
            ("vocabulary", f"{config['vocab_size']:,} tokens"),
            ("longest sequence", f"{config['max_position_embeddings']:,} tokens"),
            ("weights", f"{size / 1e6:,.1f} MB, {config.get('dtype', 'float32')}"),
        ],
    )


def _of(manifests: Mapping[str, Mapping[str, Any]], split: str, key: str) -> Any:
    return manifests.get(split, {}).get(key)


def _data(manifests: Mapping[str, Mapping[str, Any]], sources: Sequence[str]) -> str:
    rows: list[tuple[str, Any]] = [("source", ", ".join(sources))]
    for split, manifest in manifests.items():
        parts = [f"{manifest[key]:,} {key}" for key in ("documents", "tokens", "bytes") if manifest.get(key)]
        rows.append((split, ", ".join(parts)))
        if fingerprint := manifest.get("fingerprint"):
            rows.append((f"{split}: fingerprint", f"`{fingerprint}`"))
    return _table("Data", rows)


def _training(recipe: Mapping[str, Any], environment: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    t, o = recipe.get("train", {}), recipe.get("optimizer", {})
    steps = max((row["step"] for row in rows), default=None)
    tokens = None
    if steps and {"batch_size", "accumulation", "window"} <= set(t):
        a_step = t["batch_size"] * t["accumulation"] * t["window"]
        tokens = f"{a_step:,} a step, {steps * a_step:,} in all (places of windows, padding included)"
    gpus = environment.get("gpus") or []
    machine = ", ".join(sorted({f"{gpus.count(gpu)} x {gpu}" for gpu in gpus})) or environment.get("cpu")
    return _table(
        "Training",
        [
            ("steps", f"{steps:,}" if steps else None),
            ("tokens", tokens),
            ("optimizer", o.get("name")),
            ("peak learning rate", f"{o['lr']:g}" if "lr" in o else None),
            ("schedule", o.get("schedule")),
            ("seed", t.get("seed")),
            ("ranks", environment.get("ranks") if environment.get("ranks", 1) > 1 else None),
            ("machine of the first rank" if environment.get("ranks", 1) > 1 else "machine", machine),
            ("code", environment.get("code")),
            ("torch", environment.get("packages", {}).get("torch")),
        ],
    )


def _figures(
    recipe: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, float],
) -> str:
    last: Mapping[str, Any] = next((row for row in reversed(rows) if row.get("held_out_loss") is not None), {})
    loss = last.get("held_out_loss")
    on = "answers' tokens" if recipe.get("train", {}).get("loss_on") == "answers" else "tokens"
    bits = last.get("held_out_bits_per_byte")
    figures: list[tuple[str, Any]] = []
    if loss is not None:
        figures += [
            (f"held-out loss, nats ({on})", f"{loss:.4f}"),
            ("held-out perplexity", f"{math.exp(min(loss, 700)):,.2f}"),
            ("held-out bits per byte", f"{bits:.4f}" if bits is not None else None),
            ("measured at step", f"{last['step']:,}"),
        ]
    return _table("Measured", figures + [(name, f"{score:.4f}") for name, score in evaluation.items()])


def _use(repo: str) -> str:
    return f"""## Use

The architecture is medassist's: install it first. It is a plugin of vLLM, and registers with transformers by
`import modeling`.

```bash
medassist serve DIRECTORY        # a local copy, behind an OpenAI-compatible API; checked against fingerprint.json
vllm serve {repo}
```

```python
import modeling
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""


def _limits(parameters: int, tokens: int | None) -> str:
    seen = f" whose training text has {tokens:,} tokens" if tokens else ""
    return f"""## Limits

* This is a model of {parameters:,} parameters{seen}.
  It knows what stands there often, and invents the rest in the same tone.
* **It is not medical advice.** No clinician has reviewed what it says; do not decide about anyone's care by it.
* It has no safety training. What the text holds of errors, biases and outdated practice, it may repeat.
* The figures above are all that was measured."""
