"""What a training step of a layer takes on a CPU, as ratios with the goals that they have: alone,
SyncBN against torch.nn.BatchNorm2d; on two ranks over gloo, against a layer written by hand.

Layers take turns in one process (or in each of the ranks), a time is that of the lower quartile, in
one thread; what other processes do then meets both alike. Returns 1 if a goal is missed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
FAR = 1e4  # mean over deviation of an input whose float32 sum of squares has no digit of a variance
Row = tuple[tuple[int, ...], float, float]  # shape, and seconds of theirs and of ours


class Comparison(NamedTuple):
    """Ours over theirs: the largest geometric mean over the shapes, and the largest row."""

    ranks: int
    dtype: str
    layout: str
    mean_over_std: float
    goal: float
    goal_of_rows: float | None = None

    def __str__(self) -> str:
        theirs = "nn.BatchNorm2d" if self.ranks == 1 else "by hand, two ranks"
        return f"{self.dtype}, {self.layout}, mean/std {self.mean_over_std:g}: ours / {theirs}"


COMPARISONS = (
    Comparison(1, "fp32", "channels_first", 0.0, 1.5, 3.0),
    Comparison(1, "fp32", "channels_last", 0.0, 2.0, 3.0),
    Comparison(1, "bf16", "channels_first", 0.0, 2.5),
    Comparison(1, "bf16", "channels_last", 0.0, 3.0),
    Comparison(1, "fp32", "channels_first", FAR, 2.5),
    Comparison(1, "fp32", "channels_last", FAR, 2.5),
    *(
        Comparison(2, dtype, layout, 0.0, 0.5, 1.0)
        for dtype in ("fp32", "bf16")
        for layout in LAYOUTS
    ),
)


def training_step(layer: torch.nn.Module, input: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward, to the gradients of input, weight and bias."""
    leaves = [input.detach().requires_grad_(), *layer.parameters()]
    grad_output = torch.randn_like(input)
    return lambda: torch.autograd.grad(layer(leaves[0]), leaves, grad_output)


def measure(place: Place | None, comparison: Comparison, samples: int) -> list[Row]:
    """Rows of all shapes; of the slowest rank, where there is a place in a group."""
    torch.set_num_threads(1)
    theirs = torch.nn.BatchNorm2d if place is None else HandwrittenSyncBN
    # A thread's own time is blind to other processes, but also to waiting for ranks, which counts.
    clock = time.thread_time if place is None else time.perf_counter
    rows: list[Row] = []
    for shape in SHAPES:
        data = torch.randn(shape) + comparison.mean_over_std
        input = laid_out(data.to(DTYPES[comparison.dtype]), comparison.layout)
        layers = theirs(shape[1]), triton_syncbn.SyncBN(shape[1])
        calls = {number: training_step(layer, input) for number, layer in enumerate(layers)}
        times = time_calls(calls, input.device, samples, clock=clock)
        theirs_seconds, ours_seconds = (float(np.percentile(times[n].host, 25)) for n in calls)
        rows.append((shape, theirs_seconds, ours_seconds))
    return rows


def measure_on_ranks(place: Place, comparison: Comparison, samples: int) -> list[Row]:
    """As `measure`, in a group."""
    return measure(place, comparison, samples)


def verdict(value: float, goal: float | None) -> str:
    """A ratio next to its goal."""
    if goal is None:
        return f"{value:.2f}"
    return f"{value:.2f} (at most {goal:g}: {'reached' if value <= goal else 'MISSED'})"


def summary(comparison: Comparison, rows: list[Row]) -> tuple[str, bool]:
    """A line with the geometric mean and the largest ratio; whether both are within their goals."""
    ratios = [ours / theirs for _, theirs, ours in rows]
    mean, largest = statistics.geometric_mean(ratios), max(ratios)
    reached = mean <= comparison.goal and largest <= (comparison.goal_of_rows or largest)
    line = (
        f"geometric mean {verdict(mean, comparison.goal)}, "
        f"largest {verdict(largest, comparison.goal_of_rows)}"
    )
    return line, reached


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, then a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("ranks", "dtype", "layout", "mean_over_std"):
        choices = list(dict.fromkeys(getattr(each, name) for each in COMPARISONS))
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, nargs="+", type=type(choices[0]), choices=choices, default=choices
        )
    parser.add_argument("--samples", type=int, default=200)
    options = vars(parser.parse_args(arguments))
    samples = options.pop("samples")
    lines, all_reached = [], True
    for comparison in COMPARISONS:
        if any(getattr(comparison, name) not in chosen for name, chosen in options.items()):
            continue
        print(comparison, flush=True)
        if comparison.ranks == 1:
            rows = measure(None, comparison, samples)
        else:
            rows = run_on_ranks(measure_on_ranks, comparison, samples)
        for shape, theirs, ours in rows:
            times = f"{theirs * 1e6:7.0f} us, ours {ours * 1e6:7.0f} us"
            print(f"  {shape!s:20} {times}: {ours / theirs:5.2f}", flush=True)
        line, reached = summary(comparison, rows)
        lines.append(f"{comparison}\n  {line}")
        all_reached &= reached
    print("", *lines, sep="\n")
    return int(not all_reached)


if __name__ == "__main__":
    sys.exit(main())
