"""Which replica has which beginnings of prompts in its prefix cache, as far as routing can know."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

ENTRIES = 8192

R = TypeVar("R")


class Affinity(Generic[R]):
    """Remembers the replica that last got each prefix. Bounded: the least recently used prefixes are forgotten."""

    def __init__(self, entries: int = ENTRIES) -> None:
        self._entries = entries
        self._replicas: OrderedDict[int, R] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def find(self, prefixes: Sequence[int], usable: Callable[[R], bool]) -> R | None:
        """The usable replica that got the longest of these prefixes (hashes, shortest first); None: none did."""
        for prefix in reversed(prefixes):
            replica = self._replicas.get(prefix)
            if replica is not None and usable(replica):
                return replica
        return None

    def remember(self, prefixes: Sequence[int], replica: R) -> None:
        replicas = self._replicas
        for prefix in prefixes:
            replicas[prefix] = replica
            replicas.move_to_end(prefix)
        while len(replicas) > self._entries:
            replicas.popitem(last=False)

    def keep(self, present: set[R]) -> None:
        """Forgets the prefixes of all other replicas."""
        self._replicas = OrderedDict((k, r) for k, r in self._replicas.items() if r in present)
