"""How a model's layers may be shared by ranks in training: what it declares, read by :mod:`training.parallel`.

Only plans that are exact are declared: with any number of ranks the model computes the same function. What a plan does
not name is held and computed by every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorPlan:
    """A model's ``tensor_plan``.

    Attributes:
        modules: name of a module, in which ``*`` stands for the number of a layer -> how ranks share it:

            colwise   a linear layer; each rank has some of its outputs
            rowwise   a linear layer; each rank has some of its inputs, and the outputs are summed over the ranks
            gather    a module whose result, of which each rank has made a part, is put together again
            expert    routed experts; each rank has some of them, whole, and the results are summed over the ranks
        divided: fields of the configuration that the ranks have equal parts of.
    """

    modules: Mapping[str, str]
    divided: tuple[str, ...]

    def check(self, config: Any, ranks: int) -> None:
        """Refuses ranks that cannot have equal parts.

        Raises:
            ValueError: the message names the field, its value and the ranks.
        """
        for name in self.divided:
            if (size := getattr(config, name)) % ranks:
                raise ValueError(
                    f"parallel.tensor: {name} ({size}) cannot be shared by {ranks} tensor-parallel ranks; "
                    "choose a number that divides it"
                )
