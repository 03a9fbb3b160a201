"""What a rank receives in forward in a group of 2 to 4096 ranks, by formula: where statistics are
gathered, as torch.nn.SyncBatchNorm does, and where they are summed in a ring.

The latency of a collective is the network's, and not here. Nor is backward: both layers all-reduce
2C numbers there, the stock one in float32, ours in float64.
"""

import pandas as pd

CHANNELS = 512
WORLD_SIZES = tuple(2**power for power in range(1, 13))
GATHERED_ITEM_BYTES = 4  # mean, 1/std and count of torch.nn.SyncBatchNorm: float32
REDUCED_ITEM_BYTES = 8  # sum(x), sum(x**2) and count of SyncBN: float64


def gather_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives of all others: two float32 numbers a channel and a count."""
    return (world_size - 1) * (2 * channels + 1) * GATHERED_ITEM_BYTES


def all_reduce_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives in a ring, as many float64 numbers: a reduce_scatter, and a gather
    of what it made, of 1 / world_size of them from each of the others.
    """
    return 2 * (world_size - 1) / world_size * (2 * channels + 1) * REDUCED_ITEM_BYTES


def scale_table() -> pd.DataFrame:
    """A line for each number of ranks."""
    lines = [(n, gather_bytes(n, CHANNELS), all_reduce_bytes(n, CHANNELS)) for n in WORLD_SIZES]
    return pd.DataFrame(lines, columns=["ranks", "gather", "all_reduce"])
