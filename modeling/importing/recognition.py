"""Which architecture a file holds, in whose tensor names: its publisher's or ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modeling.importing.layout import Layout
from modeling.importing.weights import Stored, Weights
from modeling.registry import REGISTRY, Architecture

# What torch.compile and data-parallel wrappers put before every name, each of them once or several times.
PREFIX = re.compile(r"(_orig_mod\.|module\.|model\.(?=_orig_mod\.|module\.))+")
# The attribute in which trainers keep the network. Names of ours begin with it too, but go on unlike published ones.
TRAINER = "model."
OURS = re.compile(r"model\.(embed_tokens|layers\.\d+)\..+")


@dataclass(frozen=True)
class Recognised:
    """A file's architecture and layout, and its tensors under bare names.

    Attributes:
        ours: the names are those of our own checkpoint directories.
        tensors: bare name -> tensor; further names that the file only mentions are among them.
        prefix: what was taken off the names.
        warnings: what the user should know.
    """

    arch: Architecture
    layout: Layout
    ours: bool
    tensors: Mapping[str, Stored]
    prefix: str
    warnings: tuple[str, ...]


def bare_tensors(weights: Weights) -> tuple[dict[str, Stored], str]:
    """Tensors under their names without a wrapper's prefix, and that prefix.

    Raises:
        ValueError: two names are the same without it.
    """
    tensors: dict[str, Stored] = {}
    prefixes: set[str] = set()
    named = [(name, name) for name in weights.stored] + list(weights.aliases.items())
    wrapped = [(match[0] if (match := PREFIX.match(name)) else "") for name, _ in named]
    signatures = [re.compile(rf"{re.escape(TRAINER)}({arch.layout().signature})") for arch in REGISTRY.values()]
    bare_names = [name[len(prefix) :] for (name, _), prefix in zip(named, wrapped, strict=True)]
    trainer = any(signature.fullmatch(name) for signature in signatures for name in bare_names)
    for (name, target), prefix in zip(named, wrapped, strict=True):
        if trainer and name.startswith(TRAINER, len(prefix)):
            prefix += TRAINER
        bare = name[len(prefix) :]
        if bare in tensors:
            raise ValueError(
                f"{weights.files[0]} has {bare} twice, as {tensors[bare].name} and as {name}: save one of the two"
            )
        prefixes.add(prefix)
        tensors[bare] = weights.stored[target]
    return tensors, " and ".join(sorted(repr(p) for p in prefixes if p)) or "none"


def recognise(weights: Weights, config: Mapping[str, Any] | None) -> Recognised:
    """Finds the architecture by tensor names, and by the configuration where several have the same ones.

    Raises:
        ValueError: no architecture of the registry has such tensors; the message says what there is instead.
    """
    tensors, prefix = bare_tensors(weights)
    claims = _claims(config)
    named = [a for a in REGISTRY.values() if claims & {a.model_type, a.hf_name, *a.layout().model_types}]
    own = sum(bool(OURS.fullmatch(name)) for name in tensors)
    if own:
        if named and own * 2 > len(tensors):
            arch, layout = named[0], own_layout(named[0], config or {})
            _check_refused(layout, weights, tensors)
            ours = not layout.own_names or bool(claims & {arch.model_type, arch.hf_name})
            return Recognised(arch, layout, ours, tensors, prefix, ())
        raise ValueError(_foreign(weights, tensors, claims))
    fitting = [a for a in REGISTRY.values() if any(re.fullmatch(a.layout().signature, name) for name in tensors)]
    if len(fitting) == 1:
        _check_refused(fitting[0].layout(), weights, tensors)
    if not fitting:
        raise ValueError(_foreign(weights, tensors, claims))
    warnings = []
    # A head's name tells more than the configuration, and the configuration more than the blocks' names, which
    # architectures have in common.
    heads = [a for a in fitting if set(a.layout().tied) & set(tensors)]
    arch = next((a for a in heads if a in named), None) or next(
        (a for a in named if a in fitting or _shares_names(a, fitting)), heads[0] if heads else fitting[0]
    )
    if named and arch not in named:
        raise ValueError(
            f"{weights.files[0]} has the tensor names of {arch.model_type}, but its configuration is one of "
            f"{named[0].model_type} ({', '.join(sorted(claims))[:200]}): the two do not belong together"
        )
    if heads and arch not in heads:
        raise ValueError(
            f"{weights.files[0]} has a head as {heads[0].model_type} calls it ({', '.join(heads[0].layout().tied)}), "
            f"but its configuration is one of {arch.model_type}: the two do not belong together"
        )
    if claims and not named:
        warnings.append(
            f"the configuration calls the model {', '.join(sorted(claims))[:200]}, which is unknown here; by its "
            f"tensors' names it is a {arch.model_type}"
        )
    return Recognised(arch, arch.layout(), False, tensors, prefix, tuple(warnings))


def own_layout(arch: Architecture, given: Mapping[str, Any]) -> Layout:
    """The layout of our own checkpoint directories: every name is itself.

    Args:
        given: the configuration, which says whether head and embedding are one.
    """
    tied = given.get("tie_word_embeddings", arch.config_class().tie_word_embeddings)
    ties = getattr(arch.model_class(), "_tied_weights_keys", None) if tied else None
    ties = dict(ties) if isinstance(ties, dict) else {}
    if arch.layout().own_names:
        return replace(arch.layout(), tensors=lambda config: _itself(arch, config), tied=ties)
    return Layout(
        signature=OURS.pattern,
        tensors=lambda config: _itself(arch, config),
        sizes=lambda shapes, known: {},
        tied=ties,
        model_types=arch.layout().model_types,
        tokenizers=arch.layout().tokenizers,
    )


def _itself(arch: Architecture, config: Any) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in own_shapes(arch, config)}


def own_shapes(arch: Architecture, config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of ours and its shape; a tied head is left out. No memory is taken.

    Raises:
        ValueError: sizes that no machine could hold.
    """
    import torch

    model_class = arch.model_class()
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (RuntimeError, OverflowError, TypeError) as e:
        raise ValueError(f"the configuration's sizes are beyond what can be computed with ({e})") from None
    ties = (getattr(model_class, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in ties}
    return dict(arch.layout().in_files(shapes))


def _check_refused(layout: Layout, weights: Weights, tensors: Mapping[str, Stored]) -> None:
    for pattern, why in layout.refused.items():
        if found := next((name for name in tensors if re.fullmatch(pattern, name)), None):
            raise ValueError(f"{weights.files[0]} with {found[:120]} cannot be imported: {why}")


def _claims(config: Mapping[str, Any] | None) -> set[str]:
    if config is None:
        return set()
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])]
    return {name for name in names if isinstance(name, str) and name}


def _shares_names(arch: Architecture, fitting: list[Architecture]) -> bool:
    """An architecture whose own signature is a tensor that files may leave out, and that is otherwise as another."""
    return any(arch.layout().tensors is other.layout().tensors for other in fitting)


def _foreign(weights: Weights, tensors: Mapping[str, Stored], claims: set[str]) -> str:
    first = ", ".join(name[:80] for name in list(tensors)[:4])
    called = f" Its configuration calls it {', '.join(sorted(claims))[:200]}." if claims else ""
    hint = (
        " They look like those of our own checkpoint directories or of Llama; one of ours needs its config.json."
        if any(OURS.fullmatch(name) for name in tensors)
        else ""
    )
    return (
        f"the tensors of {weights.files[0]} are of no architecture that this project has ({', '.join(REGISTRY)}): it "
        f"has {len(tensors)}, beginning with {first}.{called}{hint}"
    )
