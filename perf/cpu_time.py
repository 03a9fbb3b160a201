"""What a training step of a layer takes on a CPU, as a ratio: alone, SyncBN against
torch.nn.BatchNorm2d; with --ranks 2, SyncBN against a layer written by hand, over gloo.

Layers take turns in one process (or in each of the ranks), a time is that of the lower quartile, in
one thread; what other processes do then meets both alike.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from layers.cases import DTYPES, LAYOUTS, laid_out
from layers.handwritten_syncbn import HandwrittenSyncBN
from machine.ranks import Place, run_on_ranks
from measuring.times import time_calls

import triton_syncbn

# Few images, as on a rank: of ResNet-50 and a small ConvNeXt, then of segmentation, and one too
# small for anything but the calls themselves to count.
SHAPES = (
    (4, 64, 28, 28),
    (4, 256, 14, 14),
    (4, 1024, 4, 4),
    (8, 96, 28, 28),
    (1, 64, 97, 97),
    (1, 2048, 25, 25),
    (1, 256, 25, 25),
    (1, 37, 16, 11),
)
Row = tuple[tuple[int, ...], float, float]  # shape, and seconds of theirs and of ours


def training_step(layer: torch.nn.Module, input: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward, to the gradients of input, weight and bias."""
    leaves = [input.detach().requires_grad_(), *layer.parameters()]
    grad_output = torch.randn_like(input)
    return lambda: torch.autograd.grad(layer(leaves[0]), leaves, grad_output)


def measure(
    place: Place | None, dtype: torch.dtype, layout: str, mean: float, samples: int
) -> list[Row]:
    """Rows of all shapes; of the slowest rank, where there is a place in a group."""
    torch.set_num_threads(1)
    theirs = torch.nn.BatchNorm2d if place is None else HandwrittenSyncBN
    # A thread's own time is blind to other processes, but also to waiting for ranks, which counts.
    clock = time.thread_time if place is None else time.perf_counter
    rows: list[Row] = []
    for shape in SHAPES:
        input = laid_out((torch.randn(shape) + mean).to(dtype), layout)
        layers = theirs(shape[1]), triton_syncbn.SyncBN(shape[1])
        calls = {number: training_step(layer, input) for number, layer in enumerate(layers)}
        times = time_calls(calls, input.device, samples, clock=clock)
        theirs_seconds, ours_seconds = (float(np.percentile(times[n].host, 25)) for n in calls)
        rows.append((shape, theirs_seconds, ours_seconds))
    return rows


def measure_on_ranks(place: Place, *arguments: Any) -> list[Row]:
    """As `measure`, in a group."""
    return measure(place, *arguments)


def describe(rows: list[Row]) -> str:
    """A line for each shape, and one for their geometric mean."""
    ratios = [ours / theirs for _, theirs, ours in rows]
    lines = [
        f"  {shape!s:20} {theirs * 1e6:7.0f} us, ours {ours * 1e6:7.0f} us: {ratio:5.2f}"
        for (shape, theirs, ours), ratio in zip(rows, ratios, strict=True)
    ]
    mean = statistics.geometric_mean(ratios)
    return "\n".join([*lines, f"  geometric mean {mean:.2f}, largest {max(ratios):.2f}"])


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--mean", type=float, default=0.0, help="of the input, in deviations")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args(arguments)
    theirs = "nn.BatchNorm2d" if options.ranks == 1 else "by hand"
    for dtype, layout in itertools.product(options.dtype, options.layout):
        print(f"{dtype}, {layout}, mean {options.mean:g}: ours / {theirs}", flush=True)
        what = DTYPES[dtype], layout, options.mean, options.samples
        rows = measure(None, *what) if options.ranks == 1 else run_on_ranks(measure_on_ranks, *what)
        print(describe(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
