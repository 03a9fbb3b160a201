"""The report as pictures. matplotlib is imported when the first is drawn, and may be missing."""

import pathlib
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from layers.cases import DTYPES
from layers.implementations import BOUND, OURS

from report.tables import baseline_of, has_ours, means, where

WIDTH = 9  # inches: at what GitHub shows of it, letters of 10 points are as large as the text's
RESOLUTION = 150  # dots per inch
CHARACTERS = 100  # of the small title, in a line
UNDER = f"more is better; {BOUND}, which does not synchronize, is the bound"
COLORS: dict[Any, Any] = {
    "torch_syncbn": "#d95f02",
    "handwritten_syncbn": "#d95f02",
    "gather_syncbn": "#e6ab02",
    BOUND: "#8c8c8c",
    OURS: "#1f78b4",
    f"{OURS}_compiled": "#33a02c",
}


def figures_of(frame: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """For each dtype and layout: speed-ups by suite and, of a GPU, bandwidths; with a name."""
    for (dtype, layout), rows in frame.groupby(["dtype", "layout"], sort=False):
        if has_ours(rows):
            title = f"Times faster than {baseline_of(rows)}, geometric means"
            yield f"speedup_{dtype}_{layout}", panel_of_each_pass(rows, title, draw_speedups)
        if rows.copy_fraction.notna().any():
            title = "GB/s, bytes by formula"
            yield f"bandwidth_{dtype}_{layout}", panel_of_each_pass(rows, title, draw_bandwidths)


def figure_of_scale(table: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Bytes against ranks, of a table of measuring/scale.py; with a name."""
    title = "Bytes that a rank receives in forward, by formula"
    plot = table.set_index("ranks").plot
    yield "scale", plot(loglog=True, marker="o", grid=True, title=title, figsize=(WIDTH, 4)).figure


def save(figures: Iterator[tuple[str, Any]], folder: pathlib.Path) -> str:
    """Draw into files. Returns which, or why there is nothing to draw with."""
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        return f"No plots: {missing.name} is not installed (pip install matplotlib)."
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures:
        files.append(str(folder / f"{name}.png"))
        figure.savefig(files[-1], dpi=RESOLUTION, bbox_inches="tight")
    return f"Plots: {', '.join(files)}"


def panel_of_each_pass(frame: pd.DataFrame, title: str, draw: Callable[[Any, Any], None]) -> Any:
    """A figure of a dtype and layout, its passes below each other, with one legend for all."""
    from matplotlib.figure import Figure

    kind = ", ".join(frame[["dtype", "layout"]].iloc[0])
    passes = list(frame["pass"].unique())
    figure = Figure(figsize=(WIDTH, 1.2 + 2.2 * len(passes)), layout="constrained")
    grid = figure.subplots(len(passes), squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, name in zip(grid, passes, strict=True):
        draw(axes, frame[frame["pass"] == name])
        axes.set(ylabel=name)
        axes.tick_params(axis="y", which="minor", labelleft=False)
        axes.grid(alpha=0.3, axis="y")
        axes.label_outer()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}; {kind}\n{UNDER}", fontsize=11)
    grid[0].set_title(textwrap.fill(where(frame), CHARACTERS), fontsize=8)
    return figure


def draw_speedups(axes: Any, rows: pd.DataFrame) -> None:
    """A group of bars for each suite, and one for all; the baseline is the line at 1."""
    by_suite = means(rows, ["suite"])
    bars = pd.concat([by_suite, means(rows, ["pass"]).set_axis(["all layers"])])
    bars.sub(1.0).plot.bar(
        ax=axes, bottom=1.0, logy=True, rot=0, legend=False, width=0.8, color=COLORS, xlabel=""
    )
    for container, name in zip(axes.containers, bars.columns, strict=True):
        axes.bar_label(container, [f"{mean:.2g}" for mean in bars[name]], fontsize=8, padding=1)
    axes.axhline(1.0, color=COLORS[baseline_of(rows)], label=baseline_of(rows))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.15)


def draw_bandwidths(axes: Any, rows: pd.DataFrame) -> None:
    """A point for each layer and implementation, against the size of the tensor."""
    roof = rows.copy_bytes_per_s.iloc[0] * 1e-9
    elements = rows["shape"].map(lambda shape: pd.Series(map(int, shape.split("x"))).prod())
    megabytes = elements * [DTYPES[dtype].itemsize for dtype in rows.dtype] * 1e-6
    for name, points in rows.groupby("impl", sort=False):
        reached = points.copy_fraction * roof
        axes.scatter(megabytes[points.index], reached, s=14, label=name, color=COLORS[name])
    axes.axhline(roof, color="black", linestyle="--", label=f"copy, {roof:,.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="tensor, MB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # 0.1, not a power of ten
