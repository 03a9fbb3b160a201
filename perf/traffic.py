"""Bytes by formula: what a rank receives for one layer in a training step, against the number of
ranks; and what a block of convolution, batch norm, add and ReLU moves in the memory of a GPU.

Writes traffic_ranks.csv, traffic_block.csv and pictures. Nothing is measured here; tests count the
bytes of our kernels.
"""

import argparse
import pathlib
import sys
from typing import Any

import pandas as pd
from measuring.scale import all_reduce_bytes, gather_bytes
from report.themes import WIDTH, Theme, write_pictures

CHANNELS = 512
WORLD_SIZES = [2**power for power in range(1, 11)]
GATE = 1 / 16  # one bit an element, in units of a bfloat16 map
# Maps that each kernel reads and writes, where input and output of the convolution are as large.
BLOCK: dict[tuple[str, str], dict[str, float]] = {
    ("forward", "eager"): {
        "convolution": 2,
        "statistics": 1,
        "normalize": 2,
        "add": 3,
        "ReLU": 2,
    },
    ("forward", "fused"): {"convolution": 2, "statistics": 1, "normalize, add, ReLU": 3 + GATE},
    ("backward", "eager"): {"convolution": 4, "ReLU": 3, "sums": 2, "gradient": 3},
    ("backward", "fused"): {"convolution": 4, "sums": 2 + GATE, "gradients": 4 + GATE},
}


def ranks_table() -> pd.DataFrame:
    """Bytes received of forward and backward; backward all-reduces 2C numbers in both layers, the
    stock one in float32.
    """
    rows = []
    for world_size in WORLD_SIZES:
        ring = 2 * (world_size - 1) / world_size * 2 * CHANNELS
        forward = gather_bytes(world_size, CHANNELS), all_reduce_bytes(world_size, CHANNELS)
        rows.append((world_size, *forward, forward[0] + 4 * ring, forward[1] + 8 * ring))
    columns = ["ranks", "stock_forward", "ours_forward", "stock_both", "ours_both"]
    return pd.DataFrame(rows, columns=columns)


def block_table() -> pd.DataFrame:
    """A row for each kernel."""
    return pd.DataFrame(
        [
            (pass_name, how, kernel, maps)
            for (pass_name, how), kernels in BLOCK.items()
            for kernel, maps in kernels.items()
        ],
        columns=["pass", "block", "kernel", "maps_moved"],
    )


def draw_ranks(table: pd.DataFrame, theme: Theme) -> Any:
    """A panel for forward, one for both passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("forward", "both"), strict=True):
        stock, ours = table[f"stock_{part}"] / 1024, table[f"ours_{part}"] / 1024
        axes.plot(table.ranks, stock, "^--", color=theme.torch, label="torch.nn.SyncBatchNorm")
        axes.plot(table.ranks, ours, "o-", color=theme.ours, label="triton_syncbn")
        axes.set(xscale="log", yscale="log", xlabel="ranks")
        axes.set_title({"forward": "forward", "both": "forward and backward"}[part])
        axes.set_xticks(table.ranks, map(str, table.ranks))
        axes.minorticks_off()
    panels[0].set_ylabel(f"KiB that a rank receives, C = {CHANNELS}")
    panels[0].legend()
    return figure


def draw_block(table: pd.DataFrame, theme: Theme) -> Any:
    """A bar for each pass, eager and fused, of a piece for each kernel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = list(table.groupby(["pass", "block"], sort=False))
    for place, ((_, how), rows) in enumerate(bars):
        left = 0.0
        color = theme.ours if how == "fused" else theme.torch
        for kernel, maps in zip(rows.kernel, rows.maps_moved, strict=True):
            shade = theme.other if kernel == "convolution" else color
            piece = axes.barh(place, maps, left=left, color=shade, edgecolor=theme.page, height=0.7)
            axes.bar_label(piece, [kernel], label_type="center", color=theme.page, fontsize=8)
            left += maps
        axes.text(left + 0.1, place, f"{left:.4g}", va="center")
    axes.set_yticks(range(len(bars)), [f"{pass_name}, {how}" for (pass_name, how), _ in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("maps read and written, in sizes of the input, bfloat16")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/traffic"), metavar="FOLDER"
    )
    options = parser.parse_args(arguments)
    ranks, block = ranks_table(), block_table()
    files = [
        *write_pictures(lambda theme: draw_ranks(ranks, theme), options.out, "traffic_ranks"),
        *write_pictures(lambda theme: draw_block(block, theme), options.out, "traffic_block"),
    ]
    ranks.to_csv(options.out / "traffic_ranks.csv", index=False)
    block.to_csv(options.out / "traffic_block.csv", index=False)
    print(ranks.to_string(index=False), block.to_string(index=False), sep="\n\n")
    print(f"Pictures: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
