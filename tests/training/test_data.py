"""Packed windows: every document whole and once an epoch, in an order that only seed and epoch decide."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.layers.objective import IGNORED, count
from training.data import Batch, PackedDocuments
from training.shards import Shard, write_shard

WINDOW = 16
# 60 documents of 2 to 17 tokens; each starts with an id of its own.
DOCUMENTS = [[100 + i, *(3 + (i * k) % 50 for k in range(1 + i * 7 % 16))] for i in range(60)]


def open_documents(tmp_path: Path, *parts: list[list[int]]) -> list[Shard]:
    for i, documents in enumerate(parts):
        write_shard(tmp_path / f"{i:05d}.shard", documents, 1000, bytes(32))
    return [Shard(path) for path in sorted(tmp_path.glob("*.shard"))]


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return open_documents(tmp_path, DOCUMENTS[:25], DOCUMENTS[25:])


def pack(shards: list[Shard], batch_size: int = 2, seed: int = 7) -> PackedDocuments:
    return PackedDocuments(shards, WINDOW, batch_size, seed)


def contents(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    """The documents of batches in order, whole again: cut where positions are 0, padding left out."""
    found = []
    for batch in batches:
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
            for a, b in pairwise(starts):
                if labels[a] != IGNORED:
                    found.append((int(ids[a]), *labels[a:b].tolist()))
    return found


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "position_ids", "labels", "is_text")
    )


def test_every_document_appears_whole_and_once_an_epoch(shards: list[Shard]) -> None:
    assert Counter(contents(pack(shards, batch_size=1).epoch())) == Counter(map(tuple, DOCUMENTS))


def test_only_windows_that_fill_no_batch_are_dropped(shards: list[Shard]) -> None:
    windows = list(pack(shards, batch_size=1).epoch())
    size = next(n for n in range(3, 9) if len(windows) % n)
    batches = list(pack(shards, batch_size=size).epoch())
    assert len(batches) == len(windows) // size
    assert contents(batches) == contents(windows[: len(batches) * size])


def test_inputs_positions_and_padding_of_a_window(tmp_path: Path) -> None:
    batch = next(PackedDocuments(open_documents(tmp_path, [[5, 6, 7, 8]]), 6, 1, 0).epoch())
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.labels.tolist() == [[6, 7, 8, IGNORED, IGNORED, IGNORED]]
    assert count(batch.labels) == 3
    assert batch.is_text.tolist() == [[True, True, True, False, False, False]]


def test_positions_count_from_zero_in_each_document(shards: list[Shard]) -> None:
    for batch in pack(shards).epoch():
        for positions in batch.position_ids:
            starts = positions == 0
            assert starts[0]
            assert bool((starts[1:] | (positions.diff() == 1)).all())


def test_labels_are_the_next_tokens_of_answers_alone(tmp_path: Path) -> None:
    start, end, end_of_text = 1, 2, 0
    document = [50, 51, start, 60, 61, end, 52, start, 62, end, end_of_text]
    data = PackedDocuments(open_documents(tmp_path, [document]), 10, 1, 0, answer_span=(start, end))
    batch = next(data.epoch())
    _ = IGNORED
    assert batch.input_ids.tolist() == [document[:-1]]
    assert batch.labels.tolist() == [[_, _, 60, 61, end, _, _, 62, end, _]]
    assert count(batch.labels) == 5


def test_order_depends_on_seed_and_epoch_alone(shards: list[Shard]) -> None:
    per_epoch = len(list(pack(shards).epoch()))
    first, again = (contents(islice(pack(shards).batches(), per_epoch)) for _ in range(2))
    assert first == again
    assert first != contents(islice(pack(shards, seed=8).batches(), per_epoch))
    second = contents(islice(pack(shards).batches(), per_epoch, 2 * per_epoch))
    assert first != second


def test_order_does_not_depend_on_how_documents_are_cut_into_shards(shards: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    others = open_documents(tmp_path / "other", DOCUMENTS[:3], [], DOCUMENTS[3:50], DOCUMENTS[50:])
    assert contents(pack(shards).epoch()) == contents(pack(others).epoch())


@pytest.mark.parametrize("first", [0, 1, 13, 40, 95])
def test_starting_late_equals_skipping_batches_across_epochs(shards: list[Shard], first: int) -> None:
    assert 5 < len(list(pack(shards).epoch())) < 40  # so that the cases begin in several epochs, and cross into others
    skipped = islice(pack(shards).batches(), first, first + 30)
    late = islice(pack(shards).batches(first=first), 30)
    assert all(same(a, b) for a, b in zip(skipped, late, strict=True))


def test_shards_are_read_where_they_lie(shards: list[Shard]) -> None:
    assert all(isinstance(shard.tokens, np.memmap) for shard in pack(shards).shards)


def test_document_longer_than_a_window_is_refused(tmp_path: Path) -> None:
    shards = open_documents(tmp_path, [list(range(18))])
    with pytest.raises(ValueError, match="18 tokens"):
        pack(shards)


@pytest.mark.parametrize("parts", [(), ([],)], ids=["no shard", "empty shard"])
def test_no_documents_are_refused(tmp_path: Path, parts: tuple[list[list[int]], ...]) -> None:
    with pytest.raises(ValueError, match="no documents"):
        pack(open_documents(tmp_path, *parts))


def test_too_few_windows_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower train\.batch_size"):
        next(pack(open_documents(tmp_path, [[1, 2, 3]])).batches())


def test_documents_without_a_pair_of_tokens_change_nothing(tmp_path: Path) -> None:
    with_empty = open_documents(tmp_path, [[], *DOCUMENTS[:30], [7], *DOCUMENTS[30:], []])
    assert Counter(contents(pack(with_empty, batch_size=1).epoch())) == Counter(map(tuple, DOCUMENTS))


def test_an_epoch_read_meanwhile_does_not_disturb_the_batches(shards: list[Shard]) -> None:
    data, undisturbed = pack(shards), list(islice(pack(shards).batches(), 60))
    batches = data.batches()
    taken = list(islice(batches, 40))
    list(data.epoch())
    taken += islice(batches, 20)
    assert all(map(same, taken, undisturbed))
