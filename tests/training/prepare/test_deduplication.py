"""Duplicates are found as often as stated, and others kept."""

import numpy as np
import pytest

from training.prepare.deduplication import BANDS, FALSE_POSITIVES, ROWS, SHINGLE, DuplicateFilter, band_keys

RNG = np.random.default_rng(7)


def keys_of(documents: list[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(document) for document in documents])
    return band_keys(np.concatenate(documents), lengths, np.arange(1, len(documents) + 1, dtype=np.uint64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    one, two = ({tuple(x[i : i + SHINGLE]) for i in range(len(x) - SHINGLE + 1)} for x in (a, b))
    return len(one & two) / len(one | two)


@pytest.mark.parametrize(("changed", "low", "high"), [(0.18, 0.65, 0.75), (0.1, 0.75, 0.85), (0.045, 0.88, 0.93)])
def test_near_duplicates_are_found_at_the_stated_rate(changed: float, low: float, high: float) -> None:
    length, pairs = 600, 300
    found, stated = 0, []
    for _ in range(pairs):
        original = RNG.integers(0, 50_000, length).astype(np.uint16)
        copy = original.copy()
        copy[length - int(length * changed) :] = RNG.integers(0, 50_000, int(length * changed))  # another ending
        similarity = jaccard(original, copy)
        assert low < similarity < high
        stated.append(1 - (1 - similarity**ROWS) ** BANDS)
        bands = keys_of([original, copy])
        found += bool((bands[0] == bands[1]).any())
    assert abs(found / pairs - np.mean(stated)) < 0.1


def test_keys_do_not_depend_on_the_documents_beside() -> None:
    documents = [RNG.integers(0, 100, n).astype(np.uint16) for n in (1, 3, 5, 6, 200)]
    together = keys_of(documents)
    lengths = np.array([200])
    alone = band_keys(documents[4], lengths, np.array([5], np.uint64))
    assert (together[4] == alone[0]).all()
    assert together.shape == (5, BANDS)
    assert together.max() < 2**60
    assert len({row.tobytes() for row in together}) == 5  # short ones are told apart by their own key


def test_false_positives_stay_as_stated_up_to_the_number_expected() -> None:
    expected = 4000
    duplicates = DuplicateFilter(expected)
    keys = RNG.integers(0, 2**60, (expected, 1 + BANDS), dtype=np.uint64)
    duplicates.remember(keys)
    others = RNG.integers(0, 2**60, (20_000, BANDS), dtype=np.uint64).tolist()
    wrong = sum(any(key in duplicates._near for key in bands) for bands in others)
    assert wrong <= 20  # 2 in the mean
    assert FALSE_POSITIVES / 2 < duplicates.false_positives(expected) < 2 * FALSE_POSITIVES
    assert duplicates.false_positives(10 * expected) > 0.1
    assert duplicates.memory < 70 * expected


def test_exact_and_near_are_told_apart_and_only_what_is_kept_is_remembered() -> None:
    duplicates = DuplicateFilter(100)
    first, second, third = list(range(1, 21)), list(range(20, 40)), list(range(39, 59))
    assert duplicates.judge(1000, first) == "kept"
    assert duplicates.judge(1000, first) == "exact"
    assert duplicates.judge(1001, second) == "near"  # one band in common
    assert duplicates.judge(1002, third) == "kept"  # in common with the one that was dropped


def test_filter_is_restored_from_its_records() -> None:
    keys = RNG.integers(0, 2**60, (50, 1 + BANDS), dtype=np.uint64)
    before, after = DuplicateFilter(100), DuplicateFilter(100)
    for row in keys.tolist():
        before.judge(row[0], row[1:])
    after.remember(keys)
    assert before._near == after._near
    assert before._exact == after._exact
