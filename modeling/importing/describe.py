"""``medassist inspect``: what a file or directory holds, and what an import of it would need."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.importing import configuration, mapping, recognition
from modeling.importing import tokenizer as tokenizers
from modeling.importing.importer import gather
from modeling.importing.recognition import Recognised
from modeling.importing.source import Source, open_source, read_json


@dataclass
class Description:
    """Labelled lines, in order."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, label: str, text: str) -> None:
        self.lines.append((label, text))


def describe(path: Path, settings: dict[str, Any] | None = None) -> Description:
    """Reads a weight file or a folder with one, without executing or changing anything.

    Args:
        settings: as for an import, to see what they would lead to.

    Raises:
        ValueError: it cannot be read at all.
    """
    result = Description()
    source = open_source(path)
    weights = source.weights
    stored = list(weights.stored.values())
    total = sum(file.stat().st_size for file in weights.files)
    result.add("format", f"{weights.format}, {len(weights.files)} file(s), {total / 1e6:,.1f} MB")
    result.add("tensors", f"{len(stored)} with {sum(t.elements for t in stored):,} elements")
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in stored)
    result.add("dtypes", ", ".join(f"{name} ({count})" for name, count in dtypes.most_common()))
    for other, name in weights.aliases.items():
        result.add("tied", f"{other} is {name} (in the metadata only)")
    if weights.extras:
        result.add("besides", ", ".join(weights.extras[:12]))
    _, prefix = recognition.bare_tensors(weights)
    result.add("prefix", prefix)
    try:
        found = recognition.recognise(weights, source.config)
    except ValueError as e:
        result.add("import", f"not possible: {e}")
        return result
    result.add("architecture", f"{found.arch.model_type}, {'our own' if found.ours else 'its published'} tensor names")
    _describe_model(result, source, found, settings or {})
    return result


def _describe_model(result: Description, source: Source, found: Recognised, settings: dict[str, Any]) -> None:
    result.add("configuration", source.config_origin)
    try:
        for name in found.layout.tied:
            if name in found.tensors:
                result.add("head", f"{found.tensors[name].name} is there; it must equal the embedding")
        gathered = gather(found, source, settings)
        for name, value in gathered.values.items():
            result.add(f"  {name}", f"{json.dumps(value)[:100]}  ({gathered.origins[name]})")
        for name, how in gathered.missing.items():
            result.add(f"  {name}", f"missing; give it with --set {name}=...  ({how})")
        for warning in (*found.warnings, *gathered.warnings):
            result.add("warning", warning)
        config = configuration.build(found, gathered)
        targets, _ = mapping.plan(found, config, gathered)
        found.layout.check(config, lambda name: found.tensors[name].read() if name in found.tensors else None)
    except ValueError as e:
        result.add("import", f"not possible as it is: {e}")
        return
    parameters = f"{sum(target.elements for target in targets):,}"
    if hasattr(config, "active_parameters"):
        active = config.active_parameters({target.name: target.elements for target in targets})
        parameters += f", of which a token uses {active:,}"
    result.add("parameters", parameters)
    if hasattr(config, "cached_width"):
        result.add("cache", _latent_cache(config))
    result.add("tokenizer", _tokenizer(source, found, config.vocab_size))
    result.add("import", "possible" + (", and needless: it is in our own format" if found.ours else ""))


def _latent_cache(config: Any) -> str:
    """Bytes that a token takes in the cache, in 16 bits, and what keys and values of all heads would take."""
    layers, latent = config.num_hidden_layers, config.cached_width
    ordinary = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return (
        f"{layers * latent * 2:,} bytes a token in 16 bits ({layers} layers of {latent}); with keys and values of "
        f"{config.num_attention_heads} heads it would be {layers * ordinary * 2:,}"
    )


def _tokenizer(source: Source, found: Recognised, vocab_size: int) -> str:
    """Which one an import would take, without fetching it."""
    if (source.folder / "tokenizer.json").exists():
        template = (source.folder / "chat_template.jinja").exists() or "chat_template" in (
            read_json(source.folder / "tokenizer_config.json")
            if (source.folder / "tokenizer_config.json").exists()
            else {}
        )
        return f"tokenizer.json, {'with' if template else 'without'} a chat template"
    encoding, file = tokenizers.named(source.folder)
    if encoding is not None:
        return f"tiktoken's {encoding[:80]} ({file})"
    if encoding := found.layout.tokenizers.get(vocab_size):
        return f"none; published models of {vocab_size} tokens use tiktoken's {encoding}"
    return "none; give one with --tokenizer, or import without (--tokenizer none)"
