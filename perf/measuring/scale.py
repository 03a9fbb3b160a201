"""From 2 to 4096 ranks: what a gather of statistics costs a rank in forward, and what an all_reduce
does.

Bytes that a rank receives are by formula. What it computes once the collective is done is measured,
on this machine: nothing is communicated, so one process is enough for any number of ranks. The
latency of a collective is the network's, and not here.

Backward is not in the table: both layers all-reduce 2C numbers there, the stock one in float32,
ours in float64.
"""

import functools
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from layers.gather_syncbn import merge
from torch import Tensor

from measuring.times import call_of, nothing, percentiles, time_calls
from triton_syncbn import ops, reference

CHANNELS = (64, 512, 2048)
WORLD_SIZES = tuple(2**power for power in range(1, 13))
GATHERED_ITEM_BYTES = 4  # mean, 1/std and count of torch.nn.SyncBatchNorm: float32
REDUCED_ITEM_BYTES = 8  # sum(x), sum(x**2) and count of SyncBN: float64
AHEAD_CYCLES = 400_000  # of an H100, 0.2 ms: the host prepares a launch meanwhile
EPS = 1e-5
MOMENTUM = 0.1


def gather_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives of all others: two float32 numbers a channel and a count."""
    return (world_size - 1) * (2 * channels + 1) * GATHERED_ITEM_BYTES


def all_reduce_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives in a ring, as many float64 numbers: a reduce_scatter, and a gather
    of what it made, of 1 / world_size of them from each of the others.
    """
    return 2 * (world_size - 1) / world_size * (2 * channels + 1) * REDUCED_ITEM_BYTES


def scale_table(
    device: torch.device,
    samples: int,
    channels: Sequence[int] = CHANNELS,
    world_sizes: Sequence[int] = WORLD_SIZES,
) -> pd.DataFrame:
    """A row for each number of channels and ranks: bytes, and medians of `samples` times."""
    rows: list[dict[str, object]] = []
    for count in channels:
        measured_us = computed_us(count, world_sizes, device, samples)
        rows += [
            {
                "channels": count,
                "world_size": world_size,
                "gather_bytes": gather_bytes(world_size, count),
                "all_reduce_bytes": all_reduce_bytes(world_size, count),
                "gather_merge_us": measured_us[world_size],
                "all_reduce_finish_us": measured_us[None],
            }
            for world_size in world_sizes
        ]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return pd.DataFrame(rows).assign(measured_on=where)


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
    calls = {ranks: call_of(work, ahead) for ranks, work in works.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = time_calls(calls, device, samples, warm_cache=True)
    finally:
        torch.set_num_threads(threads)
    return {ranks: percentiles(seconds.device)[1] for ranks, seconds in times.items()}


def scale_text(frame: pd.DataFrame) -> str:
    """The table, and what it means."""
    rows = frame.drop(columns="measured_on").to_string(index=False, float_format="{:,.1f}".format)
    where = frame.measured_on.iloc[0]
    if where == "CPU":
        computed = "gather_merge and all_reduce_finish in plain torch, one thread"
    else:
        computed = (
            "gather_merge is torch.batch_norm_gather_stats_with_counts alone, all_reduce_finish "
            "is normalize on one value a channel"
        )
    return (
        f"{rows}\n"
        "bytes: received by a rank in forward, by formula; float32 gathered, float64 reduced in a "
        f"ring.\nus: computed after the collective, medians on {where}; {computed}."
    )
