"""Where documents come from: files and data sets, read in chunks of bounded size.

A source is a file, a folder, the name of a known data set, or ``hf:NAME[:SPLIT]``. It is planned into units (a large
file, some small ones, a stream), and a unit is read as chunks: raw lines, articles or columns of at most about
``CHUNK`` bytes. Reading takes no sense of what it reads, which is the workers' part, so it is quick; and the chunks
are a function of the files alone, so that (unit, number of the chunk) is a place to continue from.

A file that ends in the middle, or whose compression is damaged, gives what can be read of it and is named in
``Chunk.damage``.
"""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from training.prepare.recipes import KNOWN
from training.prepare.xml_stream import articles

CHUNK = 2 * 2**20
LARGEST_DOCUMENT = 16 * 2**20
TextDocuments = Literal["file", "line", "blank-line"]
_KINDS = {
    ".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet", ".xml": "xml", ".nxml": "xml",
    ".tar": "tar", ".tgz": "tar",
}  # fmt: skip
# What damaged files raise. An OSError with a number is the system's, and ends the run.
_DAMAGE = (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile)


@dataclass(frozen=True)
class Unit:
    """What is read by one pass: a large file, some small ones of one kind, or a stream.

    Attributes:
        source: number of its source.
        kind: "text", "lines", "parquet", "xml", "tar" or "hub".
        files: in order; none for a stream.
        size: bytes of the files; None for a stream.
    """

    source: int
    kind: str
    files: tuple[Path, ...]
    size: int | None


@dataclass(frozen=True)
class Source:
    """One source of the command line.

    Attributes:
        name: as it was given.
        columns: of tables; joined by a blank line.
        identity: what a change is recognised by: name, size and time of modification of each file, or the stream's
            revision.
        size: bytes; None for a stream.
        hub: repository or folder and split, for a stream.
    """

    name: str
    columns: tuple[str, ...]
    identity: list[Any]
    size: int | None
    hub: tuple[str, str] | None = None


@dataclass
class Chunk:
    """What a worker gets.

    Attributes:
        kind: "lines" (blocks of JSON lines), "texts" (UTF-8 documents), "articles" (XML) or "tables" (columns).
        payload: blocks, documents, articles, or Arrow batches and dictionaries of columns.
        position: bytes of the unit's files read so far, compressed.
        too_long: documents above ``LARGEST_DOCUMENT``, left out.
        columns: of rows, in the order in which they are joined.
        damage: files that could not be read to their end.
    """

    source: int
    kind: str
    columns: tuple[str, ...] = ()
    payload: list[Any] = field(default_factory=list)
    position: int = 0
    too_long: int = 0
    damage: list[str] = field(default_factory=list)


def plan(
    names: list[str], columns: tuple[str, ...] | None, text_documents: TextDocuments
) -> tuple[list[Source], list[Unit]]:
    """Finds the files and checks that they can be read and have the columns.

    Raises:
        ValueError: nothing to read, a format that is not known, a column that is not there.
        OSError: a file that cannot be read.
    """
    sources: list[Source] = []
    units: list[Unit] = []
    for number, name in enumerate(names):
        known = None if Path(name).exists() else KNOWN.get(name)
        wanted = columns or (known.columns if known else ("text",))
        if known or name.startswith("hf:"):
            path, _, split = name.removeprefix("hf:").partition(":")
            hub = (known.path, known.split) if known else (path, split or "train")
            sources.append(Source(name, wanted, _hub_identity(hub, wanted), None, hub))
            units.append(Unit(number, "hub", (), None))
            continue
        files = _files(name)
        sizes = [path.stat().st_size for path in files]
        identity = [
            [str(path.relative_to(name)) if Path(name).is_dir() else path.name, size, path.stat().st_mtime_ns]
            for path, size in zip(files, sizes, strict=True)
        ]
        sources.append(Source(name, wanted, identity, sum(sizes)))
        _check_columns(files, wanted)
        _check_texts(files, sizes, text_documents)
        units += _units(number, files, sizes)
    return sources, units


def read(unit: Unit, source: Source, text_documents: TextDocuments) -> Iterator[Chunk]:
    """The chunks of a unit, always the same."""
    if unit.kind == "hub":
        assert source.hub is not None
        yield from _read_hub(unit.source, source.hub, source.columns)
        return
    chunk, size, before = None, 0, 0
    for path in unit.files:
        for kind, piece, position in _undamaged(_pieces(path, unit.kind, source.columns, text_documents), path):
            if chunk is None:
                chunk, size = Chunk(unit.source, kind, source.columns), 0
            chunk.position = before + position
            if kind == "damage":
                chunk.damage.append(piece)
            elif piece is None:
                chunk.too_long += 1
            else:
                chunk.kind = kind
                chunk.payload.append(piece)
                size += piece.nbytes if kind == "tables" else len(piece)
            if size >= CHUNK:
                yield chunk
                chunk = None
        before += path.stat().st_size
    if chunk is not None:
        yield chunk


Piece = tuple[str, Any, int]  # kind of the chunk, what belongs into its payload (None: too long), position in the file


def _pieces(path: Path, kind: str, columns: tuple[str, ...], text_documents: TextDocuments) -> Iterator[Piece]:
    if kind == "text":
        return _read_text(path, text_documents)
    if kind == "parquet":
        return _read_parquet(path, columns)
    return {"lines": _read_lines, "xml": _read_xml, "tar": _read_tar}[kind](path)


def _undamaged(pieces: Iterator[Piece], path: Path) -> Iterator[Piece]:
    try:
        yield from pieces
    except _DAMAGE as e:
        yield "damage", f"{path.name}: {e or type(e).__name__}", path.stat().st_size
    except (ValueError, OSError) as e:
        if getattr(e, "errno", None):
            raise
        yield "damage", f"{path.name}: {e}", path.stat().st_size


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file's content, decompressed, and the file itself, whose position is the progress."""
    with path.open("rb") as raw:
        if path.suffix in (".gz", ".tgz"):
            with gzip.GzipFile(fileobj=raw) as content:
                yield content, raw  # type: ignore[misc]
        elif path.suffix == ".zst":
            import pyarrow

            yield pyarrow.CompressedInputStream(raw, "zstd"), raw
        else:
            yield raw, raw


def _read_lines(path: Path) -> Iterator[Piece]:
    for block, position in _line_blocks(path):
        yield "lines", block, position


def _line_blocks(path: Path) -> Iterator[tuple[bytes | None, int]]:
    """Blocks of whole lines; None in place of a line that is too long."""
    with _opened(path) as (content, raw):
        rest = b""
        skipping = False  # within a line that is too long
        while block := content.read(CHUNK // 2):
            end = block.rfind(b"\n") + 1
            if skipping:
                start = block.find(b"\n") + 1
                if not start:
                    continue
                block, end, skipping = block[start:], end - start, False
            if not end:
                rest += block
                if len(rest) > LARGEST_DOCUMENT:
                    yield None, raw.tell()
                    rest, skipping = b"", True
                continue
            whole, rest = rest + block[:end], block[end:]
            yield whole, raw.tell()
        if rest:
            yield rest, raw.tell()


def _read_text(path: Path, documents: TextDocuments) -> Iterator[Piece]:
    if documents == "file":
        with _opened(path) as (content, raw):
            text = content.read(LARGEST_DOCUMENT + 1)
            yield "texts", text if len(text) <= LARGEST_DOCUMENT else None, raw.tell()
        return
    paragraph: list[bytes] = []
    size = 0
    position = 0
    for block, position in _line_blocks(path):
        if block is None:
            yield "texts", None, position
            continue
        for line in block.splitlines():
            blank = not line.strip()
            if documents == "line":
                if not blank:
                    yield "texts", line, position
            elif not blank:
                size += len(line) + 1
                # What is too long already is still followed to its end, without keeping it.
                paragraph = [] if size > LARGEST_DOCUMENT else paragraph
                paragraph.append(line)
            elif paragraph:
                yield "texts", b"\n".join(paragraph) if size <= LARGEST_DOCUMENT else None, position
                paragraph, size = [], 0
    if paragraph:
        yield "texts", b"\n".join(paragraph) if size <= LARGEST_DOCUMENT else None, position


def _read_xml(path: Path) -> Iterator[Piece]:
    with _opened(path) as (content, raw):
        for article in articles(content, LARGEST_DOCUMENT):
            yield "articles", article, raw.tell()


def _read_tar(path: Path) -> Iterator[Piece]:
    with _opened(path) as (content, raw), tarfile.open(fileobj=content, mode="r|") as bundle:
        for member in bundle:
            if member.isfile() and member.name.endswith((".xml", ".nxml")):
                member_file = bundle.extractfile(member)
                assert member_file is not None
                for article in articles(member_file, LARGEST_DOCUMENT):
                    yield "articles", article, raw.tell()


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        size, done = path.stat().st_size, 0
        rows = max(1, file.metadata.num_rows)
        row = max(1, sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)) // rows)
        for batch in file.iter_batches(max(1, min(65536, CHUNK // row)), columns=list(columns), use_threads=False):
            done += batch.num_rows
            yield "tables", batch, size * done // rows


def _read_hub(source: int, hub: tuple[str, str], columns: tuple[str, ...]) -> Iterator[Chunk]:
    chunk, size = Chunk(source, "tables", columns), 0
    part: dict[str, list[Any]] = {column: [] for column in columns}
    for row in _hub_builder(hub[0]).as_streaming_dataset(split=hub[1]):
        for column in columns:
            value = row.get(column)
            part[column].append(value)
            size += len(value if isinstance(value, str) else str(value))
        if size >= CHUNK:
            chunk.payload.append(part)
            yield chunk
            chunk, size = Chunk(source, "tables", columns), 0
            part = {column: [] for column in columns}
    chunk.payload.append(part)
    yield chunk


def _hub_builder(path: str) -> Any:
    """Raises ValueError where the data set is not to be had."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(path)
    except (OSError, datasets.exceptions.DatasetsError) as e:
        raise ValueError(
            f"the data set {path} cannot be reached ({e}); check its name and the network, or give a folder of "
            f"downloaded files as hf:FOLDER"
        ) from e


def _hub_identity(hub: tuple[str, str], columns: tuple[str, ...]) -> list[Any]:
    path, split = hub
    builder = _hub_builder(path)
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"the data set {path} has no split {split!r}; it has {', '.join(map(str, files))}")
    features = builder.info.features or builder.as_streaming_dataset(split=split).features
    names = list(features or next(iter(builder.as_streaming_dataset(split=split)), {}))
    _refuse_missing(path, names, columns)
    # The revision of a repository, or the times of modification of a folder's files.
    origin = json.dumps([builder.hash, [str(f) for f in files[split]], files[split].origin_metadata], default=str)
    return [[path, split, hashlib.sha256(origin.encode()).hexdigest()]]


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _files(name: str) -> list[Path]:
    path = Path(name)
    formats = f"it reads {', '.join(_KINDS)}, also with .gz or .zst, or hf:NAME, or one of: {', '.join(KNOWN)}"
    if not path.exists():
        raise ValueError(f"there is no file, folder or known data set {name!r}; {formats}")
    if path.is_file():
        if _kind(path) is None:
            raise ValueError(f"{name}: the format is told by the suffix, and this one is not known; {formats}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and not p.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {name} has no file of a known format; {formats}")
    return files


def _units(source: int, files: list[Path], sizes: list[int]) -> list[Unit]:
    """Small files of one kind are read together, so that a thousand of them are not a thousand tasks."""
    units: list[Unit] = []
    for path, size in zip(files, sizes, strict=True):
        kind = _kind(path)
        assert kind is not None
        last = units[-1] if units else None
        if last and last.kind == kind and last.size is not None and last.size + size <= CHUNK:
            units[-1] = Unit(source, kind, (*last.files, path), last.size + size)
        else:
            units.append(Unit(source, kind, (path,), size))
    return units


def _refuse_missing(name: object, there: list[str], columns: tuple[str, ...]) -> None:
    if missing := [column for column in columns if column not in there]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(there)}: choose with --columns")


def _check_columns(files: list[Path], columns: tuple[str, ...]) -> None:
    """Of each Parquet file, and of the first line of the first JSON lines file, which may be read through a pipe."""
    for path in files:
        if _kind(path) == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                there = pq.read_schema(path).names
            except pa.ArrowInvalid:
                continue  # counted as damaged when it is read
            _refuse_missing(path, there, columns)
    for path in (path for path in files if _kind(path) == "lines"):
        try:
            with _opened(path) as (content, _):
                line = orjson.loads(content.readline(LARGEST_DOCUMENT))
        except (*_DAMAGE, OSError, ValueError):
            continue
        if isinstance(line, dict):
            _refuse_missing(path, list(line), columns)
            break


def _check_texts(files: list[Path], sizes: list[int], documents: TextDocuments) -> None:
    for path, size in zip(files, sizes, strict=True):
        if _kind(path) == "text" and documents == "file" and size > LARGEST_DOCUMENT:
            raise ValueError(
                f"{path} is one document of {size / 2**20:,.0f} MiB, and the longest may have "
                f"{LARGEST_DOCUMENT // 2**20}: say where its documents end with --text-documents line or blank-line"
            )
