"""Sources become the same shards by any way: at once, after a crash, with any number of workers."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import modeling  # noqa: F401  the tokenizer is then made in this process, which saves starting another
from clients import data
from modeling.tokenizers import train_bpe
from tests.training.prepare.test_jats import ARTICLE, PUBMED
from training.prepare import pipeline, sources
from training.prepare.encoding import UNLIMITED, Encoder, as_tiktoken, make_tokenizer, plain_text_tokenizer
from training.prepare.pipeline import Options, prepare
from training.shards import open_shards

WORDS = [
    f"{a}{b}{c}" for a in ("car", "neu", "hep", "ost") for b in ("di", "ro", "a") for c in ("logy", "tic", "sis", "ma")
]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)).capitalize() + "."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = train_bpe((text(n) for n in range(200)), 400, UNLIMITED)
    fast.eos_token = "<|endoftext|>"
    fast.save_pretrained(folder / "bpe")
    return str(folder / "bpe")


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def decoded(out: Path, split: str) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer/tokenizer.json"))
    texts = []
    for shard in open_shards(out / split, out / "tokenizer"):
        for a, b in zip(shard.offsets, shard.offsets[1:], strict=False):
            ids = shard.tokens[int(a) : int(b)].tolist()
            assert tokenizer.id_to_token(ids[-1]) == "<|endoftext|>"
            texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in (".lock", "plan.json")}  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 4000)
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)


def test_every_format_gives_its_documents(tmp_path: Path, tokenizer: str) -> None:
    texts = [text(n) for n in range(12)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text(texts[0] + "\r\n")
    (data / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + texts[1].encode()))
    jsonl(data / "c.jsonl", texts[2:4])
    (data / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "d.jsonl", texts[4:6]).read_bytes()))
    with pa.CompressedOutputStream(str(data / "e.jsonl.zst"), "zstd") as stream:
        stream.write(jsonl(tmp_path / "e.jsonl", [texts[6]]).read_bytes())
    pq.write_table(pa.table({"text": [[texts[7], "A second part."]], "other": [1]}), data / "f.parquet")
    (data / "g.xml.gz").write_bytes(gzip.compress(b"<PubmedArticleSet>" + PUBMED + b"</PubmedArticleSet>"))
    (tmp_path / "one.nxml").write_bytes(ARTICLE)
    with tarfile.open(data / "h.tar.gz", "w:gz") as bundle:
        bundle.add(tmp_path / "one.nxml", "PMC1/one.nxml")
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "train.jsonl", texts[8:10])
    lines = tmp_path / "lines.jsonl"
    rows = [{"text": texts[10]}, [1], {"text": 3}, {"text": "too short"}, {"text": texts[11]}]
    lines.write_text("\n".join([*map(json.dumps, rows), "not JSON", "", '{"text": "\\ud800"}']))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "x.jsonl", texts).read_bytes())[:-20])
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 200)
    names = [str(data), f"hf:{hub}", str(lines), str(tmp_path / "cut.jsonl.gz"), str(tmp_path / "bad.txt")]
    out = tmp_path / "out"
    options = Options(tokenizer=tokenizer, validation=0, test=0, minimum=30)
    manifest = prepare(names, out, options, workers=2)
    found = decoded(out, "train")
    assert found[:8] == [*texts[:7], texts[7] + "\n\nA second part."]
    assert found[8].startswith("A trial of x.\n\nBackground")
    assert found[9].startswith("Statins & risk in adults\n\nBackground")
    assert found[10:] == texts[8:12]
    assert manifest["documents"]["malformed"] == 5
    assert manifest["documents"]["too_short"] == 1
    assert len(manifest["damaged_files"]) == 1
    assert "cut.jsonl.gz" in manifest["damaged_files"][0]
    assert manifest["bytes"] == sum(len(t.encode()) for t in found)
    assert open_shards(out / "test", out / "tokenizer") == []
    (hub / "train.jsonl").write_text((hub / "train.jsonl").read_text() + "\n")
    with pytest.raises(ValueError, match=r"hf:.*has changed"):
        prepare(names, out, options)


@pytest.mark.parametrize(
    ("documents", "expected"), [("line", ["One a", "Two b", "three"]), ("blank-line", ["One a\nTwo b", "three"])]
)
def test_documents_within_a_text_file(tmp_path: Path, documents: Any, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_text("One a\nTwo b\n\n \n\nthree")
    planned, units = sources.plan([str(tmp_path / "a.txt")], None, documents)
    chunks = list(sources.read(units[0], planned[0], documents))
    assert [t.decode() for chunk in chunks for t in chunk.payload] == expected


def test_long_lines_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 100)
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 1000)
    path = jsonl(tmp_path / "a.jsonl", ["one", "x" * 5000, "two", "y" * 900])
    planned, units = sources.plan([str(path)], None, "file")
    chunks = list(sources.read(units[0], planned[0], "file"))
    rows = [json.loads(line)["text"][:3] for c in chunks for block in c.payload for line in block.splitlines()]
    assert rows == ["one", "two", "yyy"]
    assert sum(chunk.too_long for chunk in chunks) == 1
    assert chunks[-1].position == path.stat().st_size


def test_splits_are_disjoint_and_duplicates_gone(tmp_path: Path, tokenizer: str) -> None:
    texts = [text(n, 200) for n in range(150)]
    near = [t.replace(t.split()[100], "changed", 1) for t in texts[:10]]
    path = jsonl(tmp_path / "a.jsonl", texts + texts[:20] + near)
    out = tmp_path / "out"
    manifest = prepare([str(path)], out, Options(tokenizer=tokenizer, validation=0.2, test=0.2), workers=1)
    counts = manifest["documents"]
    assert (counts["read"], counts["exact"]) == (180, 20)
    assert counts["near"] >= 8  # their similarity is about 0.95
    assert counts["kept"] == 180 - 20 - counts["near"]
    splits = [set(decoded(out, split)) for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == counts["kept"]
    assert len(set.union(*splits)) == counts["kept"]
    assert all(15 < len(split) < 130 for split in splits)
    shutil.rmtree(out)
    kept = Options(tokenizer=tokenizer, validation=0.2, test=0.2, deduplicate=False)
    assert prepare([str(path)], out, kept, workers=1)["documents"]["kept"] == 180
    again = [set(decoded(out, split)) for split in ("train", "validation", "test")]
    assert not again[0] & again[1] | again[0] & again[2] | again[1] & again[2]


@pytest.mark.usefixtures("small_chunks")
def test_death_at_any_moment_and_any_number_of_workers_change_nothing(tmp_path: Path, tokenizer: str) -> None:
    texts = [text(n % 170) for n in range(200)]  # 30 are duplicates of what came long before
    paths = [str(jsonl(tmp_path / f"{n}.jsonl", texts[n * 50 : n * 50 + 50])) for n in range(4)]
    options = Options(tokenizer=tokenizer, shard_tokens=1500, validation=0.1, test=0.1, expected_documents=1000)
    snapshots: list[Path] = []

    def copy(progress: pipeline.Progress) -> None:
        # What the disk holds after a chunk is what a kill at that moment leaves behind.
        if len(snapshots) < 40:
            snapshots.append(tmp_path / f"dead {len(snapshots)}")
            shutil.copytree(tmp_path / "whole", snapshots[-1])

    manifest = prepare(paths, tmp_path / "whole", options, 2, copy)
    assert manifest["documents"]["exact"] == 30
    assert len(list((tmp_path / "whole/train").glob("*.shard"))) > 4
    whole = contents(tmp_path / "whole")
    assert not any("partial" in name or "progress" in name for name in whole)
    assert len(snapshots) > 10
    for index in (0, 3, len(snapshots) // 2, len(snapshots) - 1):
        dead = snapshots[index]
        if index == 3:  # bytes after the last note, as of a write that was under way
            for partial in dead.rglob("*.partial"):
                if partial.is_file():
                    with partial.open("ab") as f:
                        f.write(b"torn")
        if index == len(snapshots) // 2:  # killed between finishing a shard and the note
            place = json.loads((dead / "progress/place.json").read_text())
            open_one = dead / f"train/{len(place['splits']['train']['shards']):05d}.partial"
            open_one.rename(open_one.with_suffix(".shard"))
        seen: list[int] = []
        assert prepare(paths, dead, options, 1, lambda p, s=seen: s.append(p.read)) == manifest  # type: ignore[misc]
        assert len(seen) < len(snapshots) or index == 0  # what was noted is not done again
        assert contents(dead) == whole


@pytest.mark.usefixtures("small_chunks")
def test_other_options_and_changed_sources_are_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [text(n) for n in range(30)])
    out = tmp_path / "out"
    options = Options(tokenizer=tokenizer)

    def die(progress: pipeline.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([str(path)], out, options, 1, die)
    for state in ("unfinished", "finished"):
        with pytest.raises(ValueError, match="begun with minimum = 100, not 50"):
            prepare([str(path)], out, Options(tokenizer=tokenizer, minimum=50))
        with pytest.raises(ValueError, match=r"begun with the sources .*a\.jsonl, not"):
            prepare([str(path), str(path)], out, options)
        before = path.stat().st_mtime_ns
        os.utime(path, ns=(before, before + 1))
        with pytest.raises(ValueError, match=r"a\.jsonl has changed"):
            prepare([str(path)], out, options)
        os.utime(path, ns=(before, before))
        if state == "unfinished":
            with pytest.raises(ValueError, match="not finished"):
                pipeline.read_manifest(out)
            prepare([str(path)], out, options, 1)
    assert prepare([str(path)], out, options, 1) == pipeline.read_manifest(out)  # nothing is done again


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda f: jsonl(f / "a.jsonl", ["x"]), {"columns": ("abstract",)}, "no column 'abstract'; it has text"),
        (lambda f: (f / "a.csv").write_text("x"), {}, "no file of a known format"),
        (lambda f: (f / "a.txt").write_text("x"), {"tokenizer": "nowhere"}, "--tokenizer nowhere"),
        (lambda f: (f / "a.txt").write_text("x"), {"validation": 0.7, "test": 0.4}, "leave something for training"),
        (lambda f: os.truncate(f / "a.txt", 2**25) if (f / "a.txt").write_text("x") else None, {}, "--text-documents"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(
    tmp_path: Path, write: Callable[[Path], object], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "in")], tmp_path / "out", Options(**options))


def test_foreign_folder_and_second_run_at_the_same_time_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [text(1)])
    with pytest.raises(ValueError, match="holds something else"):
        prepare([str(path)], tmp_path, Options(tokenizer="gpt2"))
    with pipeline._locked(tmp_path), pytest.raises(ValueError, match="another process"):
        prepare([str(path)], tmp_path, Options(tokenizer="gpt2"))


def test_text_that_spells_special_tokens_stays_text(tmp_path: Path, tokenizer: str) -> None:
    make_tokenizer(tokenizer, 0, [], tmp_path / "tokenizer", tmp_path / "encoder")
    encoder = Encoder(tmp_path / "encoder")
    assert encoder.with_tiktoken
    (ids,) = encoder.encode(["a<|endoftext|>b"])
    assert encoder.eos not in ids.tolist()
    facts = tmp_path / "encoder/facts.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"pattern": None}))
    (slow,) = Encoder(tmp_path / "encoder").encode(["a<|endoftext|>b"])
    assert slow.tolist() == ids.tolist()


def test_tiktoken_encodes_every_character_as_the_trained_tokenizer_does(tokenizer: str) -> None:
    slow = plain_text_tokenizer(Path(tokenizer) / "tokenizer.json")
    quick = as_tiktoken(slow)
    assert quick is not None
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 50_000):
        some = "a".join(characters[start : start + 50_000])
        assert slow.encode(some).ids == quick.encode_ordinary(some)


def test_tokenizer_that_differs_from_tiktoken_is_left_to_its_library(tokenizer: str, tmp_path: Path) -> None:
    state = json.loads((Path(tokenizer) / "tokenizer.json").read_text())
    merges = state["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert as_tiktoken(plain_text_tokenizer(tmp_path / "tokenizer.json")) is None


def test_killed_command_leaves_no_process_and_continues(tmp_path: Path, tokenizer: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [text(n, 3000) for n in range(900)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "clients.cli", "data", "prepare", str(path), "--out", str(out),
               "--tokenizer", tokenizer, "--workers", "1", "--shard-tokens", "100000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "progress/place.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not (out / "manifest.json").exists()
    options = Options(tokenizer=tokenizer, shard_tokens=100_000)
    manifest = prepare([str(path)], out, options, 1)
    assert prepare([str(path)], tmp_path / "whole", options, 1) == manifest
    assert contents(out) == contents(tmp_path / "whole")


def test_share_that_came_out_empty_is_warned_of(tmp_path: Path, tokenizer: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [text(n) for n in range(4)])

    def warnings(name: str, *shares: str) -> list[str]:
        command = ["prepare", str(path), "--out", str(tmp_path / name), "--tokenizer", tokenizer, "--workers", "1"]
        result = CliRunner().invoke(data.app, [*command, *shares])
        assert result.exit_code == 0, result.output
        return [line for line in result.stderr.splitlines() if line.startswith("warning: ")]

    validation, test = warnings("both")
    assert "none of the 4 documents fell to validation" in validation
    assert "will not be able to report held-out loss" in validation
    assert "--validation" in validation
    assert "fell to test" in test
    assert "--test" in test
    assert warnings("unasked", "--validation", "0", "--test", "0") == []
    (train,) = warnings("nothing left", "--validation", "0.999999", "--test", "0")
    assert "nothing to train on" in train
