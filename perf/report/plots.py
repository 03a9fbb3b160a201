"""The report as pictures. matplotlib is imported when the first is drawn, and may be missing."""

import pathlib
import textwrap
from typing import Any

import pandas as pd
from layers.cases import Case

from report.tables import baseline_of, geometric_means, ours_of, where

RESOLUTION = 150  # dots per inch
CHARACTERS_AN_INCH = 13  # of the title
COLORS = {
    "torch_syncbn": "#d95f02",
    "gather_syncbn": "#d95f02",
    "torch_batchnorm": "#7f7f7f",
    "triton_syncbn": "#1f78b4",
    "triton_syncbn_compiled": "#33a02c",
}


def write_plots(frame: pd.DataFrame, folder: pathlib.Path) -> str:
    """Draw into a folder; returns what was done, in a line."""
    if missing := matplotlib_is_missing():
        return missing
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "bandwidth.png"]
    draw_bandwidth(frame).savefig(files[0], dpi=RESOLUTION)
    if ours_of(frame):
        files.append(folder / "speedup.png")
        draw_speedups(frame).savefig(files[1], dpi=RESOLUTION)
    return f"Plots: {', '.join(map(str, files))}"


def write_scale_plot(frame: pd.DataFrame, folder: pathlib.Path) -> str:
    """Draw a table of measuring/scale.py into a folder; returns what was done, in a line."""
    if missing := matplotlib_is_missing():
        return missing
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scale.png"
    draw_scale(frame).savefig(file, dpi=RESOLUTION)
    return f"Plots: {file}"


def matplotlib_is_missing() -> str | None:
    """Prepare to draw into files; a line that says why there is nothing to draw with, or None."""
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        return f"No plots: {missing.name} is not installed (pip install matplotlib)."
    matplotlib.use("agg")
    return None


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure with a grid of axes, sizes of each in inches, and space for a legend below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)


def kinds(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of dtype and layout."""
    return list(frame[["dtype", "layout"]].drop_duplicates().itertuples(index=False, name=None))


def draw_bandwidth(frame: pd.DataFrame) -> Any:
    """Gigabytes per second against the size of the tensor: a panel for each pass and kind."""
    passes = list(frame["pass"].unique())
    figure, grid = panels(len(kinds(frame)), len(passes), 4.2, 3.4)
    megabytes = pd.Series(
        [
            Case("", "", tuple(map(int, shape.split("x"))), dtype, "").bytes * 1e-6
            for shape, dtype in zip(frame["shape"], frame.dtype, strict=True)
        ],
        index=frame.index,
    )
    roof = (frame.gbytes_per_s / frame.copy_fraction).median()
    for line, (dtype, layout) in enumerate(kinds(frame)):
        for column, pass_name in enumerate(passes):
            axes = grid[line][column]
            of_panel = (
                (frame.dtype == dtype) & (frame.layout == layout) & (frame["pass"] == pass_name)
            )
            for impl in frame.impl.unique():
                chosen = frame[of_panel & (frame.impl == impl)]
                axes.scatter(
                    megabytes[chosen.index],
                    chosen.gbytes_per_s,
                    s=14,
                    label=impl,
                    alpha=0.8,
                    color=COLORS.get(impl),
                )
            axes.axhline(roof, color="black", linestyle="--", label=f"copy, {roof:,.1f} GB/s")
            axes.set(xscale="log", yscale="log", title=f"{pass_name}, {dtype}, {layout}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")  # 0.1, not a power of ten
            axes.grid(alpha=0.3)
            if line == len(kinds(frame)) - 1:
                axes.set_xlabel("tensor, MB")
            if column == 0:
                axes.set_ylabel("bytes by formula, GB/s")
    _finish(figure, grid[0][0], frame, "Bandwidth, up is better")
    return figure


def draw_speedups(frame: pd.DataFrame) -> Any:
    """Geometric means by suite: a panel for each of ours and kind, a bar for each pass."""
    impls = ours_of(frame)
    figure, grid = panels(len(kinds(frame)), len(impls), 9.0, 3.2)
    means = geometric_means(frame, ["dtype", "layout", "suite", "pass"]).reset_index()
    for line, (dtype, layout) in enumerate(kinds(frame)):
        for column, impl in enumerate(impls):
            axes = grid[line][column]
            of_panel = (means.dtype == dtype) & (means.layout == layout)
            bars = means[of_panel].pivot(index="suite", columns="pass", values=impl)
            bars = bars.reindex(
                index=list(frame.suite.unique()),  # also one that is not in this layout
                columns=list(frame["pass"].unique()),
            )
            bars.plot.bar(
                ax=axes, rot=20, legend=False, width=0.75, color=["#a6cee3", "#1f78b4", "#08306b"]
            )
            for container, pass_name in zip(axes.containers, bars.columns, strict=True):
                labels = ["" if pd.isna(mean) else f"{mean:.2f}" for mean in bars[pass_name]]
                axes.bar_label(container, labels, fontsize=8, padding=1)
            axes.axhline(1.0, color="black", linewidth=0.8, zorder=0)
            axes.set(title=f"{impl}, {dtype}, {layout}", xlabel="")
            axes.margins(y=0.12)
            if column == 0:
                axes.set_ylabel(f"times faster than\n{baseline_of(frame)}")
    _finish(figure, grid[0][0], frame, "Speed-up by suite, geometric mean; above 1 is faster")
    return figure


def draw_scale(frame: pd.DataFrame) -> Any:
    """What a gather and an all_reduce cost against the ranks: bytes, and times; a line for the
    fewest and the most channels of a table.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    by_formula, measured = figure.subplots(1, 2)
    by_formula.set(title="Received by a rank in forward, by formula", ylabel="bytes")
    where = frame.measured_on.iloc[0]
    measured.set(title=f"Computed after the collective, measured, {where}", ylabel="microseconds")
    for axes, column, color in (
        (by_formula, "gather_bytes", "tab:red"),
        (by_formula, "all_reduce_bytes", "tab:blue"),
        (measured, "gather_merge_us", "tab:red"),
        (measured, "all_reduce_finish_us", "tab:blue"),
    ):
        name = column.rpartition("_")[0].replace("_", " ")
        for channels, style in ((frame.channels.min(), "o--"), (frame.channels.max(), "o-")):
            of_channels = frame[frame.channels == channels]
            axes.plot(
                of_channels.world_size,
                of_channels[column],
                style,
                color=color,
                markersize=4,
                label=f"{name}, C = {channels}",
            )
    sizes = sorted(frame.world_size.unique())
    for axes in (by_formula, measured):
        axes.set(xlabel="ranks", xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _finish(figure: Any, axes: Any, frame: pd.DataFrame, title: str) -> None:
    """One legend below, the title and where it was measured above."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    characters = int(figure.get_figwidth() * CHARACTERS_AN_INCH)
    lines = textwrap.fill(where(frame), characters)
    figure.suptitle(f"{title}\n{lines}", fontsize=9)
