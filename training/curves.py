"""Pictures of a run: ``metrics.jsonl`` in, ``curves.png`` and ``curves.svg`` out."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.trackers import read

# Two of Okabe and Ito's colours, which people who are colour-blind can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "medassist",  # the same run, the same file
    "svg.fonttype": "path",
}
Points = tuple[list[float], list[float]]


def draw(metrics: Path, out_dir: Path) -> list[Path]:
    """Draws what there is of loss, held-out loss, learning rate, gradient norm, tokens/s and balance of experts.

    Args:
        metrics: a run's ``metrics.jsonl``.
        out_dir: where ``curves.png`` and ``curves.svg`` go.

    Returns:
        The two files; none where there is nothing to draw.

    Raises:
        ValueError: matplotlib is missing, or the metrics are no JSON lines.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("curves need matplotlib: pip install 'medassist[watch]'") from error

    rows = read(metrics)
    small = [
        (title, points, scale)
        for title, points, scale in (
            ("Learning rate", series(rows, "lr"), "linear"),
            ("Gradient norm", series(rows, "grad_norm"), "log"),
            ("Tokens per second", series(rows, "tokens_per_second"), "linear"),
            ("Load of experts: variation, worst layer", series(rows, "expert_load_cv", max), "linear"),
        )
        if points[0]
    ]  # fmt: skip
    if not small and not series(rows, "loss")[0] and not series(rows, "held_out_loss")[0]:
        return []
    with rc_context(STYLE):
        lines = math.ceil(len(small) / 2)
        figure = Figure(figsize=(9, 3.6 + 2.1 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1 + lines, 2, height_ratios=[1.9] + [1.0] * lines)
        _draw_losses(figure.add_subplot(grid[0, :]), rows)
        for i, (title, points, scale) in enumerate(small):
            alone = i == len(small) - 1 and i % 2 == 0
            axes = figure.add_subplot(grid[1 + i // 2, :] if alone else grid[1 + i // 2, i % 2])
            _draw_small(axes, title, points, scale)
        paths = [out_dir / "curves.png", out_dir / "curves.svg"]
        figure.savefig(paths[0], dpi=130)
        figure.savefig(paths[1], metadata={"Date": None})
    paths[1].write_text(_with_numbered_clips(paths[1].read_text()))
    return paths


def _with_numbered_clips(svg: str) -> str:
    """The same picture, whose clipping paths are called by their number: matplotlib calls them by where they lie in
    memory, and the same run would give another file."""
    for number, name in enumerate(re.findall(r'<clipPath id="(\w+)"', svg)):
        svg = svg.replace(f'"{name}"', f'"clip{number}"').replace(f"(#{name})", f"(#clip{number})")
    return svg


def series(rows: Sequence[dict[str, Any]], name: str, of: Callable[[Any], float] = float) -> Points:
    """Steps and values of a figure, where it is a finite number; ``of`` makes a number of a list."""
    steps, values = [], []
    for row in rows:
        value = row.get(name)
        if value is None or value == []:
            continue
        number = of(value)
        if math.isfinite(number):
            steps.append(float(row["step"]))
            values.append(number)
    return steps, values


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over the ``width`` values around each. At the start, where a loss falls fast, there are fewer on both sides
    alike; at the end only those to come are missing, so that the last value alone is no turn of the curve."""
    result = []
    for i in range(len(values)):
        half = min(width // 2, i)
        part = values[i - half : i + half + 1]
        result.append(sum(part) / len(part))
    return result


def _draw_losses(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    steps, losses = series(rows, "loss")
    held_steps, held = series(rows, "held_out_loss")
    if len(losses) >= 10:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smoothed(losses, max(3, len(losses) // 40)), color=BLUE, label="training (smoothed)")
    elif losses:
        axes.plot(steps, losses, color=BLUE, marker="o", markersize=3, label="training")
    if held:
        label = f"held out ({held[-1]:.4g} at step {held_steps[-1]:,.0f})"
        axes.plot(held_steps, held, color=ORANGE, marker="o", markersize=4, linewidth=1.0, label=label)
    axes.set_title("Loss, nats a token")
    _scale(axes, [*losses, *held], "log" if _wide([*losses, *held]) else "linear")
    axes.set_xlabel("step")
    if losses or held:
        axes.legend(loc="upper right")


def _draw_small(axes: Any, title: str, points: Points, scale: str) -> None:
    steps, values = points
    if len(values) < 10:
        axes.plot(steps, values, color=BLUE, marker="o", markersize=3)
    elif scale == "log":  # noisy
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
        axes.plot(steps, smoothed(values, max(3, len(values) // 40)), color=BLUE)
    else:
        axes.plot(steps, values, color=BLUE, linewidth=1.2)
    axes.set_title(title, fontsize=9)
    _scale(axes, values, "log" if scale == "log" and _wide(values) else "linear")
    if scale == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")


def _wide(values: Sequence[float]) -> bool:
    """Whether values span so much that a linear axis would flatten the end of the curve."""
    return bool(values) and min(values) > 0 and max(values) > 8 * min(values)


def _scale(axes: Any, values: Sequence[float], scale: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_yscale(scale)
    if scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(values) < 300 * min(values) else (1.0,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.3g}"))
