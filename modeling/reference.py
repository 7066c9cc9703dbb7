"""What an architecture is checked against, by tests that the registry generates.

Each architecture has one :class:`Reference`, in its ``reference.py``. Tests turn it into: configuration round trip,
saving and loading, gradient flow, cache against full forward, batch against single, golden numbers, the Hugging Face
twin, and the vLLM class against the module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Golden:
    """Logits that the authors' own program printed for a tiny model in the published layout.

    The published tensors, sorted by name with a tied head left out, are filled by a formula: element n of tensor i
    (both from 0, row-major) is ``0.3 sin(0.37 n + 1.1 (i + 1))`` in float64; gains of norms are ``1 + 0.1 sin(...)``.

    Attributes:
        config: the configuration, in the published file's own names.
        token_ids: the sequence.
        logits: position -> logits after it.
        gains: regular expression of the tensors that are gains of norms.
        settings: fields given at the import besides, such as ``{"causal": True}``.
    """

    config: Mapping[str, Any]
    token_ids: Sequence[int]
    logits: Mapping[int, Sequence[float]]
    gains: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What there is to check an architecture against.

    Attributes:
        variants: changes to the ``tiny()`` preset that are computed differently, each checked on its own; the first is
            the default.
        golden: golden numbers of the published program.
        twin: a Hugging Face model of stock transformers with the weights of the given model of ours (any variant), or
            None where that variant has no twin.
    """

    variants: Sequence[Mapping[str, Any]] = ({},)
    golden: Sequence[Golden] = ()
    twin: Callable[[Any], Any] = lambda model: None
