"""Exact and near duplicates, found in memory that is fixed beforehand.

Exact: the SHA-256 of the cleaned text. Near: MinHash (Broder 1997; rensa's R-MinHash) over the set of all runs of
``SHINGLE`` tokens, cut into ``BANDS`` bands of ``ROWS`` values each. Two documents of Jaccard similarity ``s`` share a
band, and the later is dropped, with probability ``1 - (1 - s**ROWS)**BANDS``:

    similarity    0.5    0.6    0.7    0.8    0.9    0.95
    dropped       0.5%   4.3%   24%    76%    99.9%  100%

Bands are looked up in a Bloom filter and not in an index of all documents (LSHBloom, Khan et al. 2024), so memory does
not grow with the corpus: 65 bytes for each document expected. A document that resembles none is dropped wrongly with
probability ``FALSE_POSITIVES`` once as many are kept as were expected, less before, and more after that.
"""

import math

import numpy as np
from rbloom import Bloom
from rensa import RMinHash

SHINGLE = 5
BANDS, ROWS = 20, 12
FALSE_POSITIVES = 1e-4  # of a document, over all its bands
EXACT_FALSE_POSITIVES = 1e-9
_SEED = 42
# Odd factors of multiplicative hashing, one for each place of a shingle and each value of a digest.
_ODD = np.random.default_rng(0).integers(0, 2**63, SHINGLE + BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(
    1
)
_SIXTY_BITS = np.uint64(2**60 - 1)  # Python hashes these to themselves


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others (the finaliser of SplitMix64), in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def band_keys(tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The keys of each document's bands.

    Args:
        tokens: of all documents, one after the other.
        lengths: ``(documents,)`` how many each has, none of them 0.
        keys: ``(documents,)`` uint64, of each whole document; stands for its shingles where it is too short for one.

    Returns:
        ``(documents, BANDS)`` uint64 below 2**60.
    """
    if not len(lengths):
        return np.empty((0, BANDS), np.uint64)
    ids = tokens.astype(np.uint64)
    shingles = np.zeros(len(ids), np.uint64)
    for place in range(SHINGLE):
        shingles[: len(ids) - place] += ids[place:] * _ODD[place]
    _mix(shingles)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # Runs that reach into the next document are replaced by one of the document's own: sets have no repeats.
    own = np.where(lengths >= SHINGLE, shingles[starts], keys)
    for back in range(1, SHINGLE):
        inside = lengths >= back
        shingles[ends[inside] - back] = own[inside]
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, BANDS * ROWS, _SEED)
    digests = np.array(matrix.to_rows(), dtype=np.uint64) * _ODD[SHINGLE:]
    # The factors differ from band to band, so equal values in two bands are not equal keys.
    return _mix(digests.reshape(len(lengths), BANDS, ROWS).sum(axis=2, dtype=np.uint64)) & _SIXTY_BITS


class DuplicateFilter:
    """Remembers the documents kept, in memory that ``expected`` decides."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self._exact = Bloom(expected, EXACT_FALSE_POSITIVES)
        self._near = Bloom(expected * BANDS, FALSE_POSITIVES / BANDS)

    @property
    def memory(self) -> int:
        """Bytes that the filters take."""
        return (self._exact.size_in_bits + self._near.size_in_bits) // 8

    def false_positives(self, kept: int) -> float:
        """Probability with which a document unlike all others is dropped once ``kept`` are remembered."""
        bits = self._near.size_in_bits
        hashes = max(1, round(math.log2(BANDS / FALSE_POSITIVES)))
        key = -(math.expm1(-hashes * BANDS * kept / bits) ** 1)
        return -math.expm1(BANDS * math.log1p(-(key**hashes)))

    def judge(self, exact: int, bands: list[int]) -> str:
        """``"exact"``, ``"near"`` or ``"kept"``; a document that is kept is remembered."""
        if exact in self._exact:
            return "exact"
        near = self._near
        for key in bands:
            if key in near:
                return "near"
        self._exact.add(exact)
        near.update(bands)
        return "kept"

    def remember(self, records: np.ndarray) -> None:
        """Takes documents in that were kept before: ``(documents, 1 + BANDS)`` uint64, exact key and bands."""
        self._exact.update(records[:, 0].tolist())
        self._near.update(records[:, 1:].ravel().tolist())
