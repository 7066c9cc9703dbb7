"""Tables and report of ``medassist bench train``; :mod:`loadtest.training` defines the figures."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from loadtest.engine_report import aligned

if TYPE_CHECKING:
    from loadtest.training import Result, Row


def reading(result: Result) -> str:
    """The main figures in a sentence or two."""
    ours, *others = result.rows
    than = " and ".join(f"{median(row.ratios):.2f} times {row.who}'s" for row in others)
    return (
        f"{ours.who}: {ours.rate:,.0f} tokens a {_second(result)}, {than}. Making its batches takes {ours.loading:.2%} "
        f"of a step, and would take {result.documents_loading:.2%} with whole documents in windows."
    )


def tables(result: Result) -> str:
    """The contenders, and our options where there are any."""
    head = ["", f"tokens a {_second(result)}", "tokens a second passed", "medassist / it", "of rounds", "same loss"]
    lines = [head + _mfu_head(result)]
    for row in result.rows:
        lines.append([row.who, *_rates(row), *_ratio(row), f"{row.difference:.0e}", *_mfu(row, result)])
    if not result.choices:
        return aligned(lines)
    # Here the first row is the plain step, and what matters is what an option makes of it.
    rows = [["option", *head[1:3], "it / plain", "of rounds", "step's memory, MiB", *_mfu_head(result)]]
    for row in result.choices:
        gains = [1 / ratio for ratio in row.ratios]
        rows.append(
            [row.who, *_rates(row), f"{median(gains):.2f}", f"{min(gains):.2f} to {max(gains):.2f}",
             f"{row.memory / 2**20:,.0f}" if row.memory else "-", *_mfu(row, result)]
        )  # fmt: skip
    return aligned(lines) + "\n\n" + aligned(rows)


def markdown(result: Result, facts: dict[str, str], definitions: str) -> str:
    """The report."""
    both = [["", ""], *([name, str(value)] for name, value in (facts | result.settings).items())]
    parts = ["# The training step", aligned(both), reading(result), tables(result), definitions.rstrip()]
    return "\n\n".join(parts) + "\n"


def _second(result: Result) -> str:
    return "GPU-second" if result.on_gpu else "CPU-second"


def _rates(row: Row) -> list[str]:
    return [f"{row.rate:,.0f}", f"{row.passed_rate:,.0f}"]


def _ratio(row: Row) -> list[str]:
    return [f"{median(row.ratios):.2f}", f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"]


def _mfu_head(result: Result) -> list[str]:
    return ["MFU"] if result.peak else []


def _mfu(row: Row, result: Result) -> list[str]:
    return [f"{row.rate * result.flops_per_token / result.peak:.1%}"] if result.peak else []
