"""From 2 to 4096 ranks: what a gather of statistics costs, and what an all_reduce does.

The first word of a column says what kind of number it holds. `wire`: bytes that a rank receives in
forward, by formula. `model`: latency by the formulas of collectives.py, with assumed constants.
`measured`: the time of what a rank computes once the collective is done, on this machine.

Backward is not in the table: both layers all-reduce 2C numbers there, the stock one in float32,
ours in float64.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import collectives
import pandas as pd
import torch
from collectives import Network
from gather_syncbn import merge
from timing import Call, nothing, percentiles, time_calls
from torch import Tensor

from triton_syncbn import ops, reference

CHANNELS = (64, 512, 2048)
MODELS = ("gather_us", "gather_doubling_us", "all_reduce_ring_us", "all_reduce_tree_us")
WORLD_SIZES = tuple(2**power for power in range(1, 13))
SAMPLES = 20
AHEAD_CYCLES = 400_000  # of an H100, 0.2 ms: the host prepares a launch meanwhile
EPS = 1e-5
MOMENTUM = 0.1


def scale_table(
    channels: Sequence[int] = CHANNELS,
    world_sizes: Sequence[int] = WORLD_SIZES,
    device: torch.device | None = None,
    network: Network | None = None,
    samples: int = SAMPLES,
) -> pd.DataFrame:
    """A row for each number of channels and ranks: bytes on the wire, modelled latencies, and
    measured times (medians of `samples`) of what follows the collective.

    Nothing is communicated, so one process on one device is enough for any number of ranks.
    """
    device = device or torch.device("cpu")
    network = network or Network()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []
    for count in channels:
        measured_us = computed_us(count, world_sizes, device, samples)
        for world_size in world_sizes:
            row: dict[str, object] = {"channels": count, "world_size": world_size}
            for name in ("gather_bytes", "all_reduce_bytes"):
                row[f"wire_{name}"] = getattr(collectives, name)(world_size, count)
            for name in MODELS:
                row[f"model_{name}"] = getattr(collectives, name)(world_size, count, network)
            row["measured_gather_merge_us"] = measured_us[world_size]
            row["measured_all_reduce_finish_us"] = measured_us[None]
            row["measured_on"] = where
            rows.append(row)
    return pd.DataFrame(rows)


def gather_merge(world_size: int, channels: int, device: torch.device) -> Callable[[], object]:
    """What a rank computes from a gathered tensor of so many rows to have mean and 1/std.

    On a GPU: torch.batch_norm_gather_stats_with_counts, one launch. What the stock layer does
    around it (to drop empty ranks, to split and to cast) is not included. On a CPU, where that
    operator does not exist: the merge of gather_syncbn.py in plain torch.
    """
    gathered = _gathered_statistics(world_size, channels, device)
    if device.type == "cpu":
        return lambda: reference.mean_and_variance(merge(gathered, EPS))
    means, rstds, counts = gathered.split((channels, channels, 1), dim=1)
    input = torch.zeros(1, channels, device=device)  # read for its dtype alone
    running_mean, running_var = torch.zeros_like(input[0]), torch.ones_like(input[0])
    return lambda: torch.batch_norm_gather_stats_with_counts(
        input, means, rstds, running_mean, running_var, MOMENTUM, EPS, counts.view(-1)
    )


def all_reduce_finish(channels: int, device: torch.device) -> Callable[[], object]:
    """What a rank computes from the reduced moments to have mean and 1/std, whatever the number of
    ranks.

    On a GPU this is part of the kernel that normalizes: timed is that kernel on a map of one value
    a channel, running statistics included. On a CPU: the same formulas in plain torch.
    """
    moments = merge(_gathered_statistics(2, channels, device), EPS)
    if device.type == "cpu":
        return lambda: reference.mean_and_variance(moments)
    input = torch.zeros(1, channels, device=device)
    running_mean, running_var = torch.zeros_like(input[0]), torch.ones_like(input[0])
    return lambda: ops.normalize(
        input,
        moments,
        None,
        None,
        running_mean=running_mean,
        running_var=running_var,
        momentum=MOMENTUM,
        eps=EPS,
    )


def _gathered_statistics(world_size: int, channels: int, device: torch.device) -> Tensor:
    """Mean, 1/std and count of every rank, float32 [ranks, 2C + 1], with 1000 values a channel."""
    generator = torch.Generator(device).manual_seed(0)
    means, spread = torch.randn(2, world_size, channels, generator=generator, device=device) / 10
    counts = torch.full((world_size, 1), 1000.0, device=device)
    return torch.cat([means, spread.exp(), counts], dim=1)


def computed_us(
    channels: int, world_sizes: Sequence[int], device: torch.device, samples: int
) -> dict[int | None, float]:
    """Median time in microseconds of the merge for each number of ranks; under None, of what
    follows an all_reduce. Of the device on a GPU, with a warm cache, as a collective has just
    written what is read; else of the host, on one thread.
    """
    gpu = device.type == "cuda"
    ahead = functools.partial(torch.cuda._sleep, AHEAD_CYCLES) if gpu else nothing
    works: dict[int | None, Callable[[], object]] = {None: all_reduce_finish(channels, device)}
    works |= {ranks: gather_merge(ranks, channels, device) for ranks in world_sizes}
    calls = {ranks: Call(_without_argument(work), ahead) for ranks, work in works.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = time_calls(calls, device, samples, warm_cache=True)
    finally:
        torch.set_num_threads(threads)
    return {ranks: percentiles(seconds.device)[1] for ranks, seconds in times.items()}


def _without_argument(work: Callable[[], object]) -> Callable[[object], object]:
    return lambda prepared: work()


def scale_text(frame: pd.DataFrame) -> str:
    """The table, and what it means."""
    rows = frame.drop(columns="measured_on").to_string(index=False, float_format="{:,.1f}".format)
    return f"{rows}\n{footer(frame)}"


def footer(frame: pd.DataFrame, network: Network | None = None) -> str:
    """What the columns mean, and the constants of the models."""
    where = frame.measured_on.iloc[0]
    if where == "CPU":
        merged = "gather_merge and all_reduce_finish in plain torch, one thread"
    else:
        merged = (
            "gather_merge is torch.batch_norm_gather_stats_with_counts alone, all_reduce_finish "
            "is normalize on one value a channel"
        )
    return (
        "wire: bytes a rank receives in forward; float32 gathered, float64 reduced in a ring.\n"
        f"model: not measured; assumed constants: {(network or Network()).describe()}.\n"
        f"measured: medians on {where}; {merged}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table and what it means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw them here")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    options = parser.parse_args(arguments)
    frame = scale_table(
        options.channels, device=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    print(scale_text(frame))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.csv, index=False, float_format="%.10g")
    if options.plot:
        from plot_scale import plot_scale

        plot_scale(frame, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
