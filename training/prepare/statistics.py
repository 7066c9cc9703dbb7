"""How long a data set's documents are, from its shards."""

from pathlib import Path
from typing import Any

import numpy as np

from training.shards import Shard

_LONGEST = 2**20  # lengths above are counted as this
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def length_statistics(folders: list[Path]) -> dict[str, Any]:
    """Tokens a document: mean, percentiles, the longest, and a histogram by powers of two.

    Percentiles are exact below 2**20 tokens, and memory does not depend on the number of documents.
    """
    counts = np.zeros(_LONGEST + 1, np.int64)
    longest = tokens = 0
    for path in (path for folder in folders for path in sorted(folder.glob("*.shard"))):
        lengths = np.diff(Shard(path).offsets.astype(np.int64))
        longest, tokens = max(longest, int(lengths.max())), tokens + int(lengths.sum())
        counts += np.bincount(np.minimum(lengths, _LONGEST), minlength=_LONGEST + 1)
    cumulated = np.cumsum(counts)
    documents = int(cumulated[-1])
    edges = [2**power for power in range(21)]
    below = [int(cumulated[edge - 1]) for edge in edges] + [documents]
    return {
        "mean": round(tokens / documents, 1),
        "longest": longest,
        "percentiles": {
            str(p): int(np.searchsorted(cumulated, max(1, -(-documents * p // 100)))) for p in _PERCENTILES
        },
        "histogram": {
            f"{low}-{2 * low - 1}" if low < _LONGEST else f"{low}-": after - before
            for low, before, after in zip(edges, below, below[1:], strict=False)
            if after > before
        },
    }
