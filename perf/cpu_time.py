"""What a training step of a layer takes on a CPU, as ratios with the goals that they have: alone,
SyncBN against torch.nn.BatchNorm2d; on two ranks over gloo, against a layer written by hand.

Layers take turns in one process (or in each of the ranks, which stay on cores of their own), a time
is that of the lower quartile, in one thread; what other processes do then meets both alike. What a
process has freed before decides how often it maps pages again, so everything is measured in three
new processes, and a row is the middle one by its ratio. On two ranks there is a third layer:
torch's batch norm between two all_reduces of nothing, a bound for what computes no faster than it.
Returns 1 if a goal is missed.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
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
ROUNDS = 3
FAR = 1e4  # mean over deviation of an input whose float32 sum of squares has no digit of a variance


class Row(NamedTuple):
    """Seconds of a training step."""

    shape: tuple[int, ...]
    theirs: float
    ours: float
    bound: float | None = None  # on two ranks

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs


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


class AllReduceBothWays(torch.autograd.Function):
    """A map as it is; sums of nothing are sent in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        """Send as much as a layer must."""
        ctx.channels = input.shape[1]
        dist.all_reduce(torch.zeros(2 * ctx.channels + 1, dtype=torch.float64))
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        """The same."""
        dist.all_reduce(torch.zeros(2 * ctx.channels, dtype=torch.float64))
        return grad_output


class Bound(torch.nn.BatchNorm2d):
    """torch's batch norm of this rank's samples, and what a layer on ranks must send."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize (N, C, H, W)."""
        return super().forward(AllReduceBothWays.apply(input))


def training_step(layer: torch.nn.Module, input: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward, to the gradients of input, weight and bias."""
    leaves = [input.detach().requires_grad_(), *layer.parameters()]
    grad_output = torch.randn_like(input)
    return lambda: torch.autograd.grad(layer(leaves[0]), leaves, grad_output)


def measure(place: Place | None, comparison: Comparison, samples: int) -> list[Row]:
    """Rows of all shapes; of the slowest rank, where there is a place in a group."""
    torch.set_num_threads(1)
    on_ranks = place is not None
    kinds: tuple[type[torch.nn.Module], ...] = (torch.nn.BatchNorm2d, triton_syncbn.SyncBN)
    if on_ranks:
        kinds = HandwrittenSyncBN, triton_syncbn.SyncBN, Bound
    # A thread's own time is blind to other processes, but also to waiting for ranks, which counts.
    clock = time.perf_counter if on_ranks else time.thread_time
    rows: list[Row] = []
    for shape in SHAPES:
        data = torch.randn(shape) + comparison.mean_over_std
        input = laid_out(data.to(DTYPES[comparison.dtype]), comparison.layout)
        calls = {n: training_step(kind(shape[1]), input) for n, kind in enumerate(kinds)}
        times = time_calls(calls, input.device, samples, clock=clock)
        rows.append(Row(shape, *(float(np.percentile(times[n].host, 25)) for n in calls)))
    return rows


def measure_on_ranks(place: Place, comparison: Comparison, samples: int) -> list[Row]:
    """As `measure`, in a group."""
    return measure(place, comparison, samples)


def middle(comparison: Comparison, samples: int) -> list[Row]:
    """Of each shape the row whose ratio is the median of as many new processes as ROUNDS."""
    rounds = []
    for _ in range(ROUNDS):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new_process:
            if comparison.ranks == 1:
                work = new_process.submit(measure, None, comparison, samples)
            else:
                work = new_process.submit(run_on_ranks, measure_on_ranks, comparison, samples)
            rounds.append(work.result())
    of_shapes = zip(*rounds, strict=True)
    return [sorted(rows, key=lambda row: row.ratio)[ROUNDS // 2] for rows in of_shapes]


def verdict(value: float, goal: float | None) -> str:
    """A ratio next to its goal."""
    if goal is None:
        return f"{value:.2f}"
    return f"{value:.2f} (at most {goal:g}: {'reached' if value <= goal else 'MISSED'})"


def summary(comparison: Comparison, rows: list[Row]) -> tuple[str, bool]:
    """A line with the geometric mean and the largest ratio; whether both are within their goals."""
    ratios = [row.ratio for row in rows]
    mean, largest = statistics.geometric_mean(ratios), max(ratios)
    reached = mean <= comparison.goal and largest <= (comparison.goal_of_rows or largest)
    line = (
        f"geometric mean {verdict(mean, comparison.goal)}, "
        f"largest {verdict(largest, comparison.goal_of_rows)}"
    )
    bounds = [row.bound / row.theirs for row in rows if row.bound is not None]
    if bounds:
        line += f"; bound: geometric mean {statistics.geometric_mean(bounds):.2f}"
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
    parser.add_argument("--samples", type=int, default=100)
    options = vars(parser.parse_args(arguments))
    samples = options.pop("samples")
    chosen = [
        comparison
        for comparison in COMPARISONS
        if all(getattr(comparison, name) in values for name, values in options.items())
    ]
    if not chosen or samples < 1:
        parser.error("expected a comparison that there is, and at least one sample")
    lines, all_reached = [], True
    for comparison in chosen:
        print(comparison, flush=True)
        rows = middle(comparison, samples)
        for row in rows:
            times = f"{row.theirs * 1e6:7.0f} us, ours {row.ours * 1e6:7.0f} us"
            bound = "" if row.bound is None else f", bound {row.bound / row.theirs:5.2f}"
            print(f"  {row.shape!s:20} {times}: {row.ratio:5.2f}{bound}", flush=True)
        line, reached = summary(comparison, rows)
        lines.append(f"{comparison}\n  {line}")
        all_reached &= reached
    print("", *lines, sep="\n")
    return int(not all_reached)


if __name__ == "__main__":
    sys.exit(main())
