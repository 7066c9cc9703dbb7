"""Metrics that are put down in a way of our own, against the library's."""

from prometheus_client import Histogram
from prometheus_client.samples import Sample

from serving.gateway.metrics import _TOKEN_SECONDS, Metrics


def test_gaps_are_counted_as_the_library_counts_them() -> None:
    metrics = Metrics()
    twin = Histogram("twin", "observed one by one", buckets=_TOKEN_SECONDS, registry=None)
    ours = metrics.of("/v1/completions", "tiny")
    for gaps in ([0.0, 0.001, 0.0010001, 0.3, 2.5, 60.0], [0.0021] * 32, [1e-9]):
        for gap in gaps:
            twin.observe(gap)
        ours.observe_gaps(gaps)
        assert gaps == []  # and are not counted again
    assert counts(metrics.inter_token) == counts(twin)


def counts(histogram: Histogram) -> list[tuple[str, str, float]]:
    def row(sample: Sample) -> tuple[str, str, float]:
        return sample.name.rsplit("_", 1)[1], sample.labels.get("le", ""), round(sample.value, 9)

    found = [row(sample) for metric in histogram.collect() for sample in metric.samples]
    return sorted(row for row in found if row[0] != "created")
