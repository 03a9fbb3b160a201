"""The table of scale.py as a picture: bytes, modelled latency and measured merge against ranks."""

import pathlib

import pandas as pd

LINES = {
    "wire_gather_bytes": ("gather", "tab:red", "-"),
    "wire_all_reduce_bytes": ("all_reduce", "tab:blue", "-"),
    "model_gather_us": ("gather, ring", "tab:red", "-"),
    "model_gather_doubling_us": ("gather, doubling", "tab:red", "--"),
    "model_all_reduce_ring_us": ("all_reduce, ring", "tab:blue", "-"),
    "model_all_reduce_tree_us": ("all_reduce, tree", "tab:blue", "--"),
    "measured_gather_merge_us": ("merge of W gathered rows", "tab:red", "-"),
    "measured_all_reduce_finish_us": ("finish of reduced sums", "tab:blue", "-"),
}
MARKERS = ("o", "s")  # the fewest channels of the table, and the most


def plot_scale(frame: pd.DataFrame, file: pathlib.Path) -> None:
    """Draw three panels, one a kind of column, for the fewest and the most channels of a table."""
    from matplotlib.figure import Figure

    where = frame.measured_on.iloc[0]
    panels = {
        "wire": ("Received by a rank in forward (formula)", "bytes"),
        "model": ("Latency of the collective (model, not measured)", "microseconds"),
        "measured": (f"Computed after the collective (measured, {where})", "microseconds"),
    }
    counts = sorted({frame.channels.min(), frame.channels.max()})
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    for axes, (kind, (title, unit)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for column, (label, color, style) in LINES.items():
            if not column.startswith(kind):
                continue
            for count, marker in zip(counts, MARKERS, strict=False):
                rows = frame[frame.channels == count].sort_values("world_size")
                axes.plot(
                    rows.world_size,
                    rows[column],
                    style,
                    color=color,
                    marker=marker,
                    markersize=4,
                    fillstyle="full" if marker == MARKERS[0] else "none",
                    label=f"{label}, C = {count}",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted(frame.world_size.unique())
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.set_xlabel("ranks, W")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
