"""Exemplars: for each bucket of a histogram, the last traced request that fell into it.

``prometheus_client`` has none where several processes share the metrics. So they are kept here: each worker has a file
of slots, mapped into its memory, in the folder of its metrics, and whoever renders the metrics reads all files.
"""

import contextlib
import mmap
import os
import struct
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import orjson
from prometheus_client import Metric
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

SLOTS = 1024  # buckets of one worker that ever had a traced request; later ones have no exemplar
_SLOT = 512  # bytes
_PAYLOAD = struct.Struct("<dd32s")  # value, time, trace id
_CHECKED = struct.Struct("<I48s")  # a reader may meet a half-written slot: it does not take it
_LENGTH = struct.Struct("<H")
_KEY = _CHECKED.size + _LENGTH.size

Key = tuple[str, str, str, str]  # name of the bucket's metric, route, model, upper bound


class Collector(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class Exemplars:
    """Those of one worker.

    Args:
        folder: of all workers; None: there is one, and no file.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._used = folder, 0
        self._slots = mmap.mmap(-1, SLOTS * _SLOT)
        if folder is not None:
            # No room on the disk: the exemplars of this worker are not told.
            with contextlib.suppress(OSError), (folder / f"exemplars_{os.getpid()}.map").open("w+b") as file:
                os.posix_fallocate(file.fileno(), 0, SLOTS * _SLOT)  # a page without a block would be a SIGBUS
                self._slots = mmap.mmap(file.fileno(), SLOTS * _SLOT)

    def series(self, metric: str, route: str, model: str, bounds: Sequence[float]) -> "Series":
        """Of one histogram, with the upper bounds of its buckets but for the infinite one."""
        return Series(self, f"{metric}_bucket", route, model, bounds)

    def allocate(self, key: Key) -> int | None:
        """The offset of a new slot; None: there is no room."""
        name = orjson.dumps(key)
        if self._used == SLOTS or _KEY + len(name) > _SLOT:
            return None
        offset = self._used * _SLOT
        self._slots[offset + _KEY : offset + _KEY + len(name)] = name
        _LENGTH.pack_into(self._slots, offset + _CHECKED.size, len(name))
        self._used += 1
        return offset

    def write(self, offset: int, value: float, trace_id: str) -> None:
        payload = _PAYLOAD.pack(value, time.time(), trace_id.encode())
        _CHECKED.pack_into(self._slots, offset, zlib.crc32(payload), payload)

    def read(self) -> dict[Key, Exemplar]:
        """The latest of all workers."""
        everything = [bytes(self._slots[: self._used * _SLOT])]
        if self._folder is not None:
            for file in self._folder.glob("exemplars_*.map"):
                with contextlib.suppress(FileNotFoundError):  # of a worker that has just gone
                    everything.append(file.read_bytes())
        found: dict[Key, tuple[float, Exemplar]] = {}
        for slots in everything:
            for key, moment, exemplar in _parse(slots):
                if key not in found or found[key][0] < moment:
                    found[key] = moment, exemplar
        return {key: exemplar for key, (_, exemplar) in found.items()}

    def attach(self, collector: Collector) -> Collector:
        """The same metrics with their exemplars."""
        return _WithExemplars(collector, self.read())


class Series:
    """See :meth:`Exemplars.series`."""

    def __init__(self, exemplars: Exemplars, name: str, route: str, model: str, bounds: Sequence[float]) -> None:
        self._exemplars, self._labels, self._bounds = exemplars, (name, route, model), bounds
        self._offsets: dict[int, int | None] = {}

    def note(self, value: float, trace_id: str) -> None:
        """An observation of a traced request."""
        bucket = bisect_left(self._bounds, value)
        try:
            offset = self._offsets[bucket]
        except KeyError:
            bound = self._bounds[bucket] if bucket < len(self._bounds) else float("inf")
            offset = self._offsets[bucket] = self._exemplars.allocate((*self._labels, floatToGoString(bound)))
        if offset is not None:
            self._exemplars.write(offset, value, trace_id)


def _parse(slots: bytes) -> Iterator[tuple[Key, float, Exemplar]]:
    for offset in range(0, len(slots) - _SLOT + 1, _SLOT):
        (length,) = _LENGTH.unpack_from(slots, offset + _CHECKED.size)
        if not length:
            return
        check, payload = _CHECKED.unpack_from(slots, offset)
        if zlib.crc32(payload) == check:
            name, route, model, bound = orjson.loads(slots[offset + _KEY : offset + _KEY + length])
            value, moment, trace_id = _PAYLOAD.unpack(payload)
            exemplar = Exemplar({"trace_id": trace_id.decode()}, value, moment)
            yield (name, route, model, bound), moment, exemplar


class _WithExemplars:
    def __init__(self, collector: Collector, exemplars: dict[Key, Exemplar]) -> None:
        self._collector, self._exemplars = collector, exemplars

    def collect(self) -> Iterator[Metric]:
        names = {key[0] for key in self._exemplars}
        for metric in self._collector.collect():
            if f"{metric.name}_bucket" in names:
                metric.samples = [
                    sample._replace(exemplar=self._exemplars.get(_key(sample))) for sample in metric.samples
                ]
            yield metric


def _key(sample: Sample) -> Key:
    name, labels = sample.name, sample.labels
    return name, labels.get("route", ""), labels.get("model", ""), labels.get("le", "")
