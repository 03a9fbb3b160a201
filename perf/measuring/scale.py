"""From 2 to 4096 ranks: what a gather of statistics costs a rank in forward, and what an all_reduce
does.

Bytes that a rank receives are by formula. On a GPU, what it computes once the collective is done is
measured: nothing is communicated, so one process is enough for any number of ranks. The latency of
a collective is the network's, and not here.

Backward is not in the table: both layers all-reduce 2C numbers there, the stock one in float32,
ours in float64.
"""

from collections.abc import Callable

import pandas as pd
import torch
from layers.gather_syncbn import merge

from measuring.times import call_of, percentiles, time_calls
from triton_syncbn import ops

CHANNELS = 512
WORLD_SIZES = tuple(2**power for power in range(1, 13))
GATHERED_ITEM_BYTES = 4  # mean, 1/std and count of torch.nn.SyncBatchNorm: float32
REDUCED_ITEM_BYTES = 8  # sum(x), sum(x**2) and count of SyncBN: float64
MOMENTUM_AND_EPS = 0.1, 1e-5


def gather_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives of all others: two float32 numbers a channel and a count."""
    return (world_size - 1) * (2 * channels + 1) * GATHERED_ITEM_BYTES


def all_reduce_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives in a ring, as many float64 numbers: a reduce_scatter, and a gather
    of what it made, of 1 / world_size of them from each of the others.
    """
    return 2 * (world_size - 1) / world_size * (2 * channels + 1) * REDUCED_ITEM_BYTES


def scale_table(device: torch.device, samples: int) -> pd.DataFrame:
    """A line for each number of ranks: bytes and, on a GPU, medians of `samples` times."""
    columns: dict[str, list[float]] = {
        "gather, bytes": [gather_bytes(size, CHANNELS) for size in WORLD_SIZES],
        "all_reduce, bytes": [all_reduce_bytes(size, CHANNELS) for size in WORLD_SIZES],
    }
    if device.type == "cuda":
        calls = {size: call_of(after_gather(size, CHANNELS, device)) for size in WORLD_SIZES}
        calls[0] = call_of(after_all_reduce(CHANNELS, device))
        times = time_calls(calls, device, samples)
        microseconds = {size: percentiles(seconds.device)[1] for size, seconds in times.items()}
        columns["gather, us"] = [microseconds[size] for size in WORLD_SIZES]
        columns["all_reduce, us"] = [microseconds[0]] * len(WORLD_SIZES)
    return pd.DataFrame(columns, pd.Index(WORLD_SIZES, name="ranks"))


def after_gather(world_size: int, channels: int, device: torch.device) -> Callable[[], object]:
    """What a rank computes from what it gathered to have mean and 1/std, in one launch. What the
    stock layer does around it (to drop empty ranks, to split and to cast) is not included.
    """
    means, rstds, counts = gathered_statistics(world_size, channels, device)
    input = torch.zeros(1, channels, device=device)  # read for its dtype alone
    buffers = torch.zeros_like(input[0]), torch.ones_like(input[0])
    return lambda: torch.batch_norm_gather_stats_with_counts(
        input, means, rstds, *buffers, *MOMENTUM_AND_EPS, counts.view(-1)
    )


def after_all_reduce(channels: int, device: torch.device) -> Callable[[], object]:
    """What a rank computes from the reduced moments to have mean and 1/std is part of the kernel
    that normalizes: this is that kernel on a map of one value a channel, running statistics
    included.
    """
    momentum, eps = MOMENTUM_AND_EPS
    moments = merge(torch.cat(gathered_statistics(2, channels, device), dim=1), eps)
    input = torch.zeros(1, channels, device=device)
    buffers = {"running_mean": torch.zeros_like(input[0]), "running_var": torch.ones_like(input[0])}
    return lambda: ops.normalize(input, moments, None, None, **buffers, momentum=momentum, eps=eps)


def gathered_statistics(
    world_size: int, channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and 1/std, float32 [ranks, C], and counts [ranks, 1], of 1000 values a channel."""
    means, spread = torch.empty(2, world_size, channels, device=device).normal_(0.0, 0.1).unbind()
    return means, spread.exp(), torch.full((world_size, 1), 1000.0, device=device)
