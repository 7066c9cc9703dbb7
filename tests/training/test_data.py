"""Windows: every token learnt once an epoch, in an order that only seed and step decide."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.layers.objective import IGNORED, count
from training.data import Batch, Windows, permuted
from training.shards import Shard, write_shard

WINDOW = 16
# 60 documents of 2 to 17 tokens; each starts with an id of its own.
DOCUMENTS = [[100 + i, *(3 + (i * k) % 50 for k in range(1 + i * 7 % 16))] for i in range(60)]
# Documents whose tokens are all different, from none to many times a window; a multiple of the window on purpose.
LENGTHS = (0, 3, 100, 1, 17, 33, 16, 18, 2, 70, 5)
LONG = [list(range(start, start + n)) for start, n in zip(np.cumsum([0, *LENGTHS[:-1]]).tolist(), LENGTHS, strict=True)]


def open_documents(tmp_path: Path, *parts: list[list[int]]) -> list[Shard]:
    for i, documents in enumerate(parts):
        write_shard(tmp_path / f"{i:05d}.shard", documents, 1000, bytes(32))
    return [Shard(path) for path in sorted(tmp_path.glob("*.shard"))]


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return open_documents(tmp_path, DOCUMENTS[:25], DOCUMENTS[25:])


def epoch(data: Windows, number: int = 0) -> Batch:
    return data.batch(data.numbers(number * len(data), len(data)))


def contents(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    """The documents of batches in order, whole again: cut where positions are 0, padding left out."""
    found = []
    for batch in batches:
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
            for a, b in pairwise(starts):
                if labels[a] != IGNORED:
                    found.append((int(ids[a]), *labels[a:b][labels[a:b] != IGNORED].tolist()))
    return found


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "position_ids", "labels", "is_text")
    )


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(b, n) for b in batches]) for n in vars(batches[0])))


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation(n: int) -> None:
    for seed, number in ((0, 0), (0, 1), (7, 0)):
        assert sorted(permuted(np.arange(n), n, seed, number).tolist()) == list(range(n))


def test_orders_differ_by_seed_and_epoch_and_are_computed_place_by_place() -> None:
    n, places = 1000, np.arange(1000)
    orders = [permuted(places, n, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, a in enumerate([places, *orders]):
        for b in orders[i:]:
            assert int((a == b).sum()) < 10  # of random permutations about one element is in place
    some = np.array([999, 3, 3, 500])
    assert permuted(some, n, 0, 0).tolist() == orders[0][some].tolist()
    assert some.tolist() == [999, 3, 3, 500]


def test_every_document_appears_whole_and_once_an_epoch(shards: list[Shard]) -> None:
    assert Counter(contents([epoch(Windows(shards, WINDOW, 7))])) == Counter(map(tuple, DOCUMENTS))


def test_every_target_of_cut_documents_appears_once_an_epoch_with_its_own_input(tmp_path: Path) -> None:
    data = Windows(open_documents(tmp_path, LONG[:4], [], LONG[4:]), WINDOW, 0)
    assert sorted(data.numbers(0, len(data)).tolist()) == list(range(len(data)))
    batch = epoch(data)
    learnt = batch.labels != IGNORED
    targets = [token for document in LONG for token in document[1:]]
    assert sorted(batch.labels[learnt].tolist()) == targets
    assert torch.equal(batch.input_ids[learnt], batch.labels[learnt] - 1)  # the token before it in its document
    assert torch.equal(learnt, batch.is_text)
    # A document goes on at the next position, or as a new one at 0; another document starts at 0.
    following = learnt[:, 1:] & (batch.input_ids.diff() == 1) & (batch.position_ids[:, 1:] > 0)
    assert bool(((batch.position_ids[:, 1:] == 0) | following | ~learnt[:, 1:]).all())


def test_windows_hold_as_many_documents_as_fit(tmp_path: Path) -> None:
    data = Windows(open_documents(tmp_path, [[1] * 9, [2] * 9, [3] * 10, [4] * 8, [5] * 40]), WINDOW, 0)
    assert data.batch(np.arange(len(data))).is_text.sum(1).tolist() == [16, 16, 16, 16, 7]


def test_inputs_positions_and_padding_of_a_window(tmp_path: Path) -> None:
    data = Windows(open_documents(tmp_path, [[5, 6, 7, 8]]), 6, 0)
    batch = data.batch(np.array([0]), rows=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0, 0], [0] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[6, 7, 8, IGNORED, IGNORED, IGNORED], [IGNORED] * 6]
    assert count(batch.labels) == 3
    assert batch.is_text.tolist() == [[True, True, True, False, False, False], [False] * 6]


def test_positions_count_from_zero_in_each_document(shards: list[Shard]) -> None:
    for positions in epoch(Windows(shards, WINDOW, 7)).position_ids:
        starts = positions == 0
        assert starts[0]
        assert bool((starts[1:] | (positions.diff() == 1)).all())


def test_labels_are_the_next_tokens_of_answers_alone(tmp_path: Path) -> None:
    start, end, end_of_text = 1, 2, 0
    document = [50, 51, start, 60, 61, end, 52, start, 62, end, end_of_text]
    batch = epoch(Windows(open_documents(tmp_path, [document]), 10, 0, answer_span=(start, end)))
    _ = IGNORED
    assert batch.input_ids.tolist() == [document[:-1]]
    assert batch.labels.tolist() == [[_, _, 60, 61, end, _, _, 62, end, _]]
    assert count(batch.labels) == 5


def test_stream_windows_are_the_text_as_it_is_stored(tmp_path: Path) -> None:
    parts = ([[*range(10)], [10], [*range(11, 40)]], [[*range(100, 109)]], [[*range(200, 209)]])
    data = Windows(open_documents(tmp_path, *parts), 8, 0, stream=True)
    batch = data.batch(np.arange(len(data)))
    firsts = [0, 8, 16, 24, 100, 200]  # a window needs the token after it: the last 7 of 40 fill none
    assert batch.input_ids.tolist() == [list(range(a, a + 8)) for a in firsts]
    assert batch.labels.tolist() == [list(range(a + 1, a + 9)) for a in firsts]
    assert batch.position_ids.tolist() == [list(range(8))] * len(firsts)
    assert bool(batch.is_text.all())
    assert sorted(epoch(data).input_ids[:, 0].tolist()) == firsts


def test_stream_windows_know_no_answers(shards: list[Shard]) -> None:
    with pytest.raises(ValueError, match=r"train\.loss_on='answers'.*data\.windows=documents"):
        Windows(shards, WINDOW, 0, stream=True, answer_span=(1, 2))


def test_order_depends_on_seed_and_epoch_alone(shards: list[Shard]) -> None:
    data = Windows(shards, WINDOW, 7)
    first = contents([epoch(data)])
    assert first == contents([epoch(Windows(shards, WINDOW, 7))])
    assert first != contents([epoch(Windows(shards, WINDOW, 8))])
    assert first != contents([epoch(data, 1)])
    assert sorted(first) == sorted(contents([epoch(data, 1)]))
    assert first == contents([epoch(data)])  # whatever was asked for in between


def test_windows_are_counted_on_through_all_epochs(shards: list[Shard]) -> None:
    data = Windows(shards, WINDOW, 7)
    whole = [number for e in range(4) for number in data.numbers(e * len(data), len(data)).tolist()]
    assert [int(data.numbers(i, 1)[0]) for i in range(len(whole))] == whole
    assert data.numbers(len(data) - 3, 2 * len(data)).tolist() == whole[len(data) - 3 :][: 2 * len(data)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 9])  # several epochs
def test_ranks_together_see_the_windows_that_one_sees(shards: list[Shard], world: int, step: int) -> None:
    data = Windows(shards, WINDOW, 7)
    alone = joined(data.micro_batches(step, 8, 8))
    shares = [data.micro_batches(step, 8, 2, rank, world) for rank in range(world)]
    assert {len(batch.input_ids) for share in shares for batch in share} == {2}
    assert same(joined([batch for share in shares for batch in share]), alone)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, 5])
def test_ranks_together_evaluate_every_window_once(shards: list[Shard], world: int, limit: int) -> None:
    data = Windows(shards, WINDOW, 7)
    ranks = [list(data.in_order(3, rank, world, limit)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch.input_ids) for batches in ranks for batch in batches} == {3}
    wanted = [data.batch(np.arange(limit or len(data)))]
    assert Counter(contents(batch for batches in ranks for batch in batches)) == Counter(contents(wanted))


def test_shards_are_read_where_they_lie(shards: list[Shard]) -> None:
    assert all(isinstance(shard.tokens, np.memmap) for shard in Windows(shards, WINDOW, 0).shards)


def test_document_with_answers_longer_than_a_window_is_refused(tmp_path: Path) -> None:
    shards = open_documents(tmp_path, [list(range(18))])
    with pytest.raises(ValueError, match=r"18 tokens.*17.*train\.window.*train\.loss_on=all"):
        Windows(shards, WINDOW, 0, answer_span=(1, 2))
    assert len(Windows(shards, WINDOW, 0)) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parts", [(), ([],), ([[7], []],)], ids=["no shard", "empty shard", "single token"])
def test_no_text_is_refused(tmp_path: Path, parts: tuple[list[list[int]], ...], stream: bool) -> None:
    with pytest.raises(ValueError, match="no text to train on"):
        Windows(open_documents(tmp_path, *parts), WINDOW, 0, stream)


def test_documents_without_a_pair_of_tokens_change_nothing(tmp_path: Path) -> None:
    with_empty = open_documents(tmp_path, [[], *DOCUMENTS[:30], [7], *DOCUMENTS[30:], []], [])
    assert Counter(contents([epoch(Windows(with_empty, WINDOW, 0))])) == Counter(map(tuple, DOCUMENTS))
