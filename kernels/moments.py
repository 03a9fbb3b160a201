"""moments: reads x once; writes sum(x), sum(x**2) of each channel and the count, float64 [2C + 1].

Each program sums deviations from a shift of its own, the mean of the first tile it reads, in
float32 lanes (float64 for float64 input); the shift is added back in float64. So nothing cancels
where the mean is large against the deviation, and an outlier in the first tile does little harm.
Programs that share a channel are added up in the same launch.
"""

import torch
import triton
import triton.language as tl

from .combine import add_splits, part_of_program, workspace
from .indexing import (
    Sizes,
    channels_of_block,
    locate_tile,
    mask_of_channel,
    sum_over_values,
    tiles_of_block,
)
from .launch import launch, plan_of
from .launch_config import LaunchConfig


@triton.jit(do_not_specialize=["rows", "channels", "columns", "splits"])
def moments_kernel(
    moments,
    input,
    partials,
    arrivals,
    rows,
    channels,
    columns,
    splits,
    TILING: tl.constexpr,
):
    """Program b * splits + s reduces tiles s, s + splits, ... of channel (or channels' block) b."""
    sizes = Sizes(rows, channels, columns)
    part = part_of_program(splits)
    channel = channels_of_block(part.block, sizes, TILING)
    tiles = tiles_of_block(sizes, TILING)

    tile = locate_tile(part.split, part.block, sizes, TILING)
    value = tl.load(input + tile.offsets, mask=tile.mask, other=0.0)
    first_values = tl.where(mask_of_channel(tile, TILING), value.to(TILING.compute), 0.0)
    shift = sum_over_values(first_values, TILING)
    shift /= tl.maximum(tile.count, 1).to(TILING.compute)
    deviations = tl.full(TILING.tile, 0.0, TILING.compute)
    squares = tl.full(TILING.tile, 0.0, TILING.compute)
    values = tl.zeros_like(tile.count).to(TILING.index)
    for number in range(part.split, tiles, splits):
        mask = mask_of_channel(tile, TILING)
        deviation = tl.where(mask, value.to(TILING.compute) - shift, 0.0)
        values += tile.count
        # The next tile is on its way while this one is added up; after the last one, nothing is.
        tile = locate_tile(number + splits, part.block, sizes, TILING)
        value = tl.load(input + tile.offsets, mask=tile.mask, other=0.0)
        deviations += deviation
        squares += deviation * deviation

    shift = shift.to(tl.float64)
    deviations = sum_over_values(deviations, TILING).to(tl.float64)
    squares = sum_over_values(squares, TILING).to(tl.float64)
    shifted = shift * values.to(tl.float64)
    total, total_of_squares, holds_totals = add_splits(
        shifted + deviations,
        squares + shift * (2.0 * deviations + shifted),
        partials,
        arrivals,
        part,
        channel,
        sizes,
    )
    mask = tl.where(holds_totals, channel.mask, False)
    tl.store(moments + channel.index, total, mask=mask)
    tl.store(moments + channels + channel.index, total_of_squares, mask=mask)
    zero = tl.arange(0, 1)
    tl.store(
        moments + 2 * channels + zero,
        ((zero.to(tl.int64) + rows) * columns).to(tl.float64),
        mask=tl.where(holds_totals, zero == part.block, False),
    )


def moments(input: torch.Tensor, config: LaunchConfig | None = None) -> torch.Tensor:
    """Moments of each channel of (N, C, *spatial), dense in either layout, of any floating dtype; N
    may be 0.

    Returns float64 [2C + 1]: sum(x) of each channel, sum(x**2) of each channel, values of a
    channel.
    """
    plan = plan_of("moments", input, config)
    channels = input.shape[1]
    output = input.new_empty(2 * channels + 1, dtype=torch.float64)
    partials, arrivals = workspace(input, channels, plan.blocks, plan.splits)
    launch(moments_kernel, plan.programs, plan, (output, input, partials, arrivals))
    return output
