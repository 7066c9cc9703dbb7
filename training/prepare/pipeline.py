"""``medassist data prepare``: from raw text to shards that training reads.

    sources -> chunks -> workers: clean, hash, tokenise -> this process: drop duplicates, split, append -> shards

Memory does not depend on the corpus: chunks are of bounded size, a bounded number of them is under way, shards are
written as they grow, and duplicates are looked up in filters of fixed size. Results are taken in the order of the
chunks, so they do not depend on the number of workers.

The folder's ``progress/`` holds what it takes to go on after any end: the plan (options and sources), the place in the
sources with all counts and lengths, and the keys of the documents kept, from which the filters are filled again. A
place is noted every ``COMMIT_SECONDS``; what was done since is done again, with the same result.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.prepare import sources
from training.prepare.deduplication import BANDS, DuplicateFilter
from training.prepare.encoding import Encoder, check_name, make_tokenizer
from training.prepare.output import SplitWriter
from training.prepare.sources import Chunk, Source, TextDocuments, Unit
from training.prepare.statistics import length_statistics
from training.prepare.work import SPLITS, Encoded, Settings, documents, encode_chunk, end_with_parent, start_worker
from training.shards import tokenizer_hash, write_json

VERSION = 2  # of what the same options and sources become
COMMIT_SECONDS = 5.0
SAMPLED = 256
COUNTS = ("read", "kept", "too_short", "too_long", "malformed", "exact", "near")


@dataclass(frozen=True)
class Options:
    """What decides the result, besides the sources.

    Attributes:
        tokenizer: a tiktoken encoding or a folder; None trains one.
        vocab_size: of a tokenizer trained here.
        sample_bytes: of text that it is trained on, train documents from the beginnings of the files.
        columns: of tables, joined by a blank line; None takes a known data set's own, or "text".
        text_documents: what a document is in plain text.
        jats: columns hold JATS XML.
        minimum: characters below which a document is left out.
        deduplicate: whether duplicates are dropped.
        expected_documents: what the filters are made for; memory is 65 bytes for each.
        validation, test: shares of documents.
        shard_tokens: tokens at which a shard is closed, at the end of a chunk.
    """

    tokenizer: str | None = None
    vocab_size: int = 4096
    sample_bytes: int = 32 * 2**20
    columns: tuple[str, ...] | None = None
    text_documents: TextDocuments = "file"
    jats: bool = False
    minimum: int = 100
    deduplicate: bool = True
    expected_documents: int = 2_000_000
    validation: float = 0.01
    test: float = 0.01
    shard_tokens: int = 2**26

    def check(self) -> None:
        """Raises ValueError for settings that cannot be."""
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"--validation {self.validation} and --test {self.test} are shares, and leave something for training"
            )
        for name in ("expected_documents", "shard_tokens", "sample_bytes", "minimum"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


class Progress(NamedTuple):
    """How far a run is: bytes of the sources' files read, all of them (None: not known), documents, tokens kept."""

    done: int
    total: int | None
    read: int
    tokens: int


def prepare(
    names: list[str],
    out: Path,
    options: Options,
    workers: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Makes a data set, or goes on making it, and returns its manifest.

    Args:
        names: sources.
        out: the data set's folder.
        workers: processes that clean and tokenise; as many as there are cores if None.
        report: called after each chunk.

    Raises:
        ValueError: options or sources that cannot be, or others than those that ``out`` was begun with; no document
            left.
        OSError: a source that cannot be read, an output that cannot be written, a worker that was killed.
    """
    options.check()
    planned, units = sources.plan(names, options.columns, options.text_documents)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check_plan(out, options, planned)
        if (out / "manifest.json").exists():
            return read_manifest(out)
        progress = out / "progress"
        progress.mkdir(exist_ok=True)
        if not ((out / "tokenizer").is_dir() and (progress / "encoder").is_dir()):
            if "torch" in sys.modules:
                _make_tokenizer(out, options, planned, units)
            else:
                # This imports transformers. In a process of its own it does not stay in memory for hours.
                with _pool(1, _start_tokenizer_maker, ()) as apart:
                    apart.submit(_make_tokenizer, out, options, planned, units).result()
        run = _Run(out, options, planned, units)
        try:
            run.work(workers or len(os.sched_getaffinity(0)), report)
            manifest = run.finish()
        finally:
            run.close()
        shutil.rmtree(progress)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set.

    Raises:
        ValueError: the folder has none.
    """
    path = folder / "manifest.json"
    if not path.exists():
        begun = (folder / "plan.json").exists()
        raise ValueError(
            f"{folder} is not finished: the command that began it continues it"
            if begun
            else f"{folder} has no manifest.json: it is no data set of `medassist data prepare`"
        )
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}): delete {folder} and prepare it again") from e


def _pool(workers: int, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> ProcessPoolExecutor:
    """Processes with a fresh interpreter each: none inherits threads, locks or memory."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=initializer, initargs=arguments)


def _start_tokenizer_maker() -> None:
    """Nothing of the architectures is needed there, nor is torch, which takes seconds to import."""
    os.environ["MEDASSIST_AUTO_CLASSES"] = "0"
    end_with_parent()


def _make_tokenizer(out: Path, options: Options, planned: list[Source], units: list[Unit]) -> None:
    sample = _sample(planned, units, options)
    make_tokenizer(options.tokenizer, options.vocab_size, sample, out / "tokenizer", out / "progress/encoder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f"another process is preparing {out}: wait for it, or choose another --out") from e
        yield


def _check_plan(out: Path, options: Options, planned: list[Source]) -> None:
    """Notes what the data set is made from, or compares with what was noted.

    Raises:
        ValueError: another option or source; the message names it.
    """
    path = out / "plan.json"
    libraries = ("rensa", "rbloom", "tiktoken", "tokenizers", "lxml")
    wanted = {
        "version": VERSION,
        "options": asdict(options) | {"tokenizer_is": check_name(options.tokenizer)},
        "sources": [{"name": source.name, "columns": source.columns, "is": source.identity} for source in planned],
        # Another version may hash or cut differently: half a data set of each would be neither's.
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }
    wanted = json.loads(json.dumps(wanted))
    others = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "plan.json.partial"))
    if others and not path.exists():
        raise ValueError(f"{out} holds something else ({others[0]}): choose an --out that is new or empty")
    if not (out / "tokenizer").exists():  # nothing is made yet that another plan would not make
        write_json(path, wanted)
        return
    noted = json.loads(path.read_text())
    remedy = f"choose another --out, or delete {out} and begin anew"
    for name, value in wanted["options"].items():
        if noted["options"].get(name) != value:
            raise ValueError(f"{out} was begun with {name} = {noted['options'].get(name)!r}, not {value!r}: {remedy}")
    was, now = ([source["name"] for source in plan["sources"]] for plan in (noted, wanted))
    if was != now:
        raise ValueError(f"{out} was begun with the sources {', '.join(was)}, not {', '.join(now)}: {remedy}")
    for before, after in zip(noted["sources"], wanted["sources"], strict=True):
        if before != after:
            changed = [str(entry[0]) for entry in (*before["is"], *after["is"])
                       if (entry in before["is"]) != (entry in after["is"])]  # fmt: skip
            what = (
                f"{changed[0]} of it is another file (size, time of modification)"
                if changed
                else "its columns are others"
            )
            raise ValueError(f"the source {before['name']} has changed since {out} was begun, {what}: {remedy}")
    finished = (out / "manifest.json").exists()
    if not finished and (noted["version"], noted["libraries"]) != (wanted["version"], wanted["libraries"]):
        raise ValueError(f"{out} was begun with other versions of {', '.join(libraries)} or this program: {remedy}")


def _sample(planned: list[Source], units: list[Unit], options: Options) -> Iterator[str]:
    """Train documents from the beginnings of up to ``SAMPLED`` units, for a tokenizer; nothing held out decides it."""
    chosen = units[:: -(-len(units) // SAMPLED)]
    share = max(1, options.sample_bytes // len(chosen))
    for unit in chosen:
        left = share
        for chunk in sources.read(unit, planned[unit.source], options.text_documents):
            for text in documents(chunk, options.jats):
                if text is None or left <= 0:
                    continue
                content = text.encode(errors="replace")
                place = (int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 11) / 2**53
                if place < 1 - options.validation - options.test:
                    left -= len(content)
                    yield content.decode()
            if left <= 0:
                break


class _Run:
    """The state of a run: a place in the sources, what is written, what is remembered."""

    def __init__(self, out: Path, options: Options, planned: list[Source], units: list[Unit]) -> None:
        self.out, self.options, self.planned, self.units = out, options, planned, units
        self.encoder = Encoder(out / "progress/encoder")
        self.settings = Settings(
            (1 - options.validation - options.test, options.validation, options.test),
            options.minimum,
            options.jats,
            options.deduplicate,
        )
        self.progress = out / "progress"
        path = self.progress / "place.json"
        noted: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.unit, self.chunk = noted.get("unit", 0), noted.get("chunk", 0)
        self.remembered = noted.get("remembered", 0)  # documents in the file of keys
        self.damage: list[str] = noted.get("damage", [])
        self.counts = [Counter(c) for c in noted.get("counts", [{}] * len(planned))]
        sha256 = tokenizer_hash(out / "tokenizer/tokenizer.json")
        self.writers = [
            SplitWriter(out / split, self.encoder.dtype, sha256, noted.get("splits", {}).get(split)) for split in SPLITS
        ]
        self.filter = DuplicateFilter(options.expected_documents) if options.deduplicate else None
        self._restore_filter()

    def _restore_filter(self) -> None:
        self.keys = (self.progress / "keys").open("a+b")
        record = (1 + BANDS) * 8
        self.keys.truncate(self.remembered * record)
        self.keys.seek(0)
        while self.filter and (block := self.keys.read(10_000 * record)):
            self.filter.remember(np.frombuffer(block, "<u8").reshape(-1, 1 + BANDS))

    def close(self) -> None:
        self.keys.close()
        for writer in self.writers:
            writer.close()

    def work(self, workers: int, report: Callable[[Progress], None]) -> None:
        """Reads, has tokenised and takes in all that is left."""
        sizes = [unit.size for unit in self.units]
        total = sum(size or 0 for size in sizes) if None not in sizes else None
        before = np.cumsum([0, *(size or 0 for size in sizes)]).tolist()
        running: deque[tuple[int, int, Chunk, Future[Encoded]]] = deque()
        last_commit = time.monotonic()
        pool = _pool(workers, start_worker, (self.progress / "encoder", self.settings))

        def take_one() -> None:
            nonlocal last_commit
            unit, number, chunk, future = running.popleft()
            full = self._take(chunk.source, future.result())
            self.unit, self.chunk = unit, number + 1
            if full or time.monotonic() - last_commit > COMMIT_SECONDS:
                self._commit()
                last_commit = time.monotonic()
            report(Progress(before[unit] + chunk.position, total, self._sum("read"), self._tokens()))

        try:
            for unit, number, chunk in self._chunks():
                position = Chunk(chunk.source, chunk.kind, position=chunk.position)
                running.append((unit, number, position, pool.submit(encode_chunk, chunk)))
                if len(running) > 2 * workers:
                    take_one()
            while running:
                take_one()
        except BrokenProcessPool as e:
            raise OSError(
                "a worker process was killed, perhaps for want of memory; the same command continues, and fewer "
                "--workers take less"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self._commit()

    def _chunks(self) -> Iterator[tuple[int, int, Chunk]]:
        for unit in range(self.unit, len(self.units)):
            planned = self.units[unit]
            done = self.chunk if unit == self.unit else 0
            chunks = sources.read(planned, self.planned[planned.source], self.options.text_documents)
            for number, chunk in enumerate(chunks):
                if number >= done:
                    yield unit, number, chunk

    def _take(self, source: int, encoded: Encoded) -> bool:
        """Takes a chunk's documents in; whether a shard was finished by it."""
        counts = self.counts[source]
        counts.update(encoded.counts)
        self.damage += encoded.damage
        kept = np.ones(len(encoded.lengths), bool)
        if self.filter:
            exact, bands = encoded.keys[:, 0].tolist(), encoded.keys[:, 1:].tolist()
            for index, (key, keys) in enumerate(zip(exact, bands, strict=True)):
                verdict = self.filter.judge(key, keys)
                if verdict != "kept":
                    kept[index] = False
                    counts[verdict] += 1
            self.keys.write(encoded.keys[kept].astype("<u8").tobytes())
            self.remembered += int(kept.sum())
        counts["kept"] += int(kept.sum())
        of_token = np.repeat(np.where(kept, encoded.splits, 255), encoded.lengths)
        full = False
        for split, writer in enumerate(self.writers):
            chosen = kept & (encoded.splits == split)
            if chosen.any():
                writer.append(
                    encoded.tokens[of_token == split], encoded.lengths[chosen], int(encoded.sizes[chosen].sum())
                )
                if writer.tokens >= self.options.shard_tokens:
                    writer.finish_shard()
                    full = True
        return full

    def _commit(self) -> None:
        """Makes all that was taken in durable, then notes the place."""
        self.keys.flush()
        os.fsync(self.keys.fileno())
        splits = {split: writer.state() for split, writer in zip(SPLITS, self.writers, strict=True)}
        write_json(
            self.progress / "place.json",
            {
                "unit": self.unit,
                "chunk": self.chunk,
                "remembered": self.remembered,
                "damage": self.damage,
                "counts": self.counts,
                "splits": splits,
            },
        )
        for writer in self.writers:
            writer.committed()

    def _sum(self, name: str) -> int:
        return sum(counts[name] for counts in self.counts)

    def _tokens(self) -> int:
        return sum(w.tokens + sum(shard["tokens"] for shard in w.shards) for w in self.writers)

    def finish(self) -> dict[str, Any]:
        """Closes the shards and writes the manifests.

        Raises:
            ValueError: no document is left.
        """
        totals = {name: self._sum(name) for name in COUNTS}
        if not totals["kept"]:
            raise ValueError(
                f"no document is left of {totals['read']:,} read ({totals['too_short']:,} shorter than "
                f"{self.options.minimum} characters, {totals['malformed']:,} malformed, {totals['too_long']:,} too "
                "long): look at --columns, --minimum and the sources"
            )
        for writer in self.writers:
            writer.finish_shard()
        self._commit()
        splits = {
            split: writer.write_manifest(self.encoder.vocab_size)
            for split, writer in zip(SPLITS, self.writers, strict=True)
        }
        tokens, text = (sum(split[name] for split in splits.values()) for name in ("tokens", "bytes"))
        names = ("documents", "tokens", "bytes", "fingerprint")
        deduplication = None
        if self.filter:
            rate = self.filter.false_positives(self.remembered)
            deduplication = {"memory": self.filter.memory, "false_positive_rate": rate}
        manifest = {
            "version": VERSION,
            "options": asdict(self.options),
            "sources": [
                {"name": source.name, "bytes": source.size, "files": len(source.identity)}
                | {name: counts[name] for name in COUNTS}
                for source, counts in zip(self.planned, self.counts, strict=True)
            ],
            "tokenizer": {"vocab_size": self.encoder.vocab_size, "eos_token_id": self.encoder.eos,
                          "dtype": self.encoder.dtype.name},
            "documents": totals,
            "damaged_files": self.damage,
            "deduplication": deduplication,
            "tokens": tokens,
            "bytes": text,
            "bytes_per_token": round(text / tokens, 4),
            "lengths": length_statistics([self.out / split for split in SPLITS]),
            "splits": {split: {name: content[name] for name in names} for split, content in splits.items()},
            "fingerprint": dataset_fingerprint(splits),
        }  # fmt: skip
        write_json(self.out / "manifest.json", manifest)
        return manifest


def dataset_fingerprint(splits: dict[str, dict[str, Any]]) -> str:
    """What identifies a data set: SHA-256 over its splits' names and fingerprints."""
    content = "\n".join(f"{name} {split['fingerprint']}" for name, split in splits.items())
    return hashlib.sha256(content.encode()).hexdigest()
