"""Token shards: what is written is read, and nothing else passes for a shard."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.shards import Shard, fingerprint, open_shards, tokenize, tokenizer_hash, write_shard

SHA = bytes(range(32))


def documents_of(shard: Shard) -> list[list[int]]:
    return [shard.tokens[int(a) : int(b)].tolist() for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)]


def make_encoder(tokenizer_dir: Path) -> Callable[[str], list[int]]:
    assert (tokenizer_dir / "tokenizer.json").exists()
    return lambda text: [ord(letter) % 100 for letter in text]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@given(
    vocab_size=st.sampled_from([10, 2**16, 2**16 + 1, 2**31]),
    fractions=st.lists(st.lists(st.floats(0, 1, exclude_max=True), max_size=6), max_size=6),
)
def test_documents_are_read_as_written(vocab_size: int, fractions: list[list[float]]) -> None:
    documents = [[int(f * vocab_size) for f in document] + [vocab_size - 1] for document in fractions] + [[]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.shard"
        write_shard(path, documents, vocab_size, SHA)
        assert documents_of(Shard(path, SHA)) == documents


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_tokens_take_two_bytes_while_the_vocabulary_allows_it(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    path = tmp_path / "00000.shard"
    write_shard(path, [[vocab_size - 1]], vocab_size, SHA)
    assert Shard(path).tokens.dtype == np.dtype(dtype)
    assert path.stat().st_size == 64 + np.dtype(dtype).itemsize + 2 * 8


@pytest.mark.parametrize("ids", [[3, 10], [-1, 3]])
def test_id_outside_the_vocabulary_is_refused_and_leaves_no_shard(tmp_path: Path, ids: list[int]) -> None:
    path = tmp_path / "00000.shard"
    with pytest.raises(ValueError, match="vocabulary of 10"):
        write_shard(path, [[1, 2], ids], 10, SHA)
    assert not path.exists()


def test_shard_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.shard"
    write_shard(path, [[1]], 10, SHA)
    with pytest.raises(ValueError, match="another tokenizer"):
        Shard(path, bytes(32))


@pytest.mark.parametrize("damage", [lambda b: b[:20], lambda b: b"X" + b[1:], lambda b: b[:-1]])
def test_damaged_shard_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "00000.shard"
    write_shard(path, [[1, 2, 3]], 10, SHA)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"00000\.shard is (not a token shard|damaged)"):
        Shard(path)


def test_shard_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.shard"
    write_shard(path, [[1]], 10, SHA)
    content = bytearray(path.read_bytes())
    content[8] = 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="version 2"):
        Shard(path)


def test_any_number_of_workers_writes_the_same_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = [f"document {i} " * (i % 4) for i in range(25)]
    files = []
    for workers in (1, 2):
        out = tmp_path / f"with {workers}"
        finished: list[int] = []
        manifest = tokenize(iter(texts), out, tokenizer_dir, make_encoder, 100, 4, workers, finished.append)
        assert [len(manifest["shards"]), manifest["documents"]] == [7, 25]
        assert manifest["tokens"] == manifest["bytes"] == sum(map(len, texts))  # a token a letter
        assert manifest["fingerprint"] == fingerprint(out)
        assert finished == [4] * 6 + [1]
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(files[0]) == 8
    assert files[0] == files[1]


def test_finished_folder_opens_in_the_order_of_the_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = ["one", "two", "three", "four", "five"]
    tokenize(iter(texts), tmp_path / "data", tokenizer_dir, make_encoder, 100, 2, 1)
    shards = open_shards(tmp_path / "data", tokenizer_dir)
    assert [ids for shard in shards for ids in documents_of(shard)] == list(map(make_encoder(tokenizer_dir), texts))


def test_folder_that_was_not_finished_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_shard(tmp_path / "00000.shard", [[1]], 10, tokenizer_hash(tokenizer_dir / "tokenizer.json"))
    with pytest.raises(ValueError, match="manifest"):
        open_shards(tmp_path, tokenizer_dir)


def test_failure_of_a_worker_leaves_the_folder_unfinished(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50"):
        tokenize(iter(["a" * 9]), tmp_path / "data", tokenizer_dir, make_encoder, 50, 2, 1)
    assert not (tmp_path / "data/manifest.json").exists()


def test_folder_whose_tokenizer_changed_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenize(iter(["one"]), tmp_path / "data", tokenizer_dir, make_encoder, 100, 2, 1)
    (tokenizer_dir / "tokenizer.json").write_text(json.dumps({"version": "2.0"}))
    with pytest.raises(ValueError, match="another tokenizer"):
        open_shards(tmp_path / "data", tokenizer_dir)


@pytest.fixture
def finished(tmp_path: Path, tokenizer_dir: Path) -> Path:
    tokenize(iter(["one", "two", "three"]), tmp_path / "data", tokenizer_dir, make_encoder, 100, 1, 1)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "00001.shard").unlink(), r"00001\.shard is missing"),
        (lambda f: (f / "00001.shard").write_bytes((f / "00001.shard").read_bytes()[:-1]), r"00001\.shard is damaged"),
        (lambda f: flip(f / "00001.shard", 64), r"00001\.shard is damaged: its SHA-256"),
        (lambda f: (f / "00001.shard").write_bytes((f / "00000.shard").read_bytes()), r"00001\.shard is damaged: its"),
        (lambda f: (f / "00009.shard").write_bytes((f / "00000.shard").read_bytes()), r"00009\.shard is foreign"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"shards": 3, "documents": 3, "tokens": 9}'), "of version 1"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("00001", "00002", 1)),
            "fingerprint",
        ),
    ],
)
def test_damaged_folder_is_refused_and_the_file_named(
    finished: Path, tokenizer_dir: Path, damage: Callable[[Path], object], message: str
) -> None:
    assert len(open_shards(finished, tokenizer_dir)) == 3
    damage(finished)
    with pytest.raises(ValueError, match=message):
        open_shards(finished, tokenizer_dir)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_without_verifying_sizes_are_still_compared(finished: Path, tokenizer_dir: Path) -> None:
    flip(finished / "00001.shard", 64)
    assert len(open_shards(finished, tokenizer_dir, verify=False)) == 3
    (finished / "00001.shard").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001\.shard is damaged"):
        open_shards(finished, tokenizer_dir, verify=False)


def test_fingerprint_changes_with_the_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    found = set()
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        tokenize(iter([text]), tmp_path / name, tokenizer_dir, make_encoder, 100, 1, 1)
        found.add(fingerprint(tmp_path / name))
    assert len(found) == 2
