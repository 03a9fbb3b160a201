"""moments: reads x once; writes sum(x), sum(x**2) of each channel and the count, float64 [2C + 1].

Each program sums deviations from a shift of its own, the mean of the first tile it reads, in
float32 lanes (float64 for float64 input); the shift is added back in float64. So nothing cancels
where the mean is large against the deviation, and an outlier in the first tile does little harm.
Programs that share a channel are added up in the same launch.
"""

import torch
import triton
import triton.language as tl

from .combine import add_splits, workspace
from .indexing import (
    channels_of_block,
    cut_rows,
    geometry,
    lanes_between,
    locate_tile,
    sum_over_values,
)
from .launch_config import LaunchConfig, compute_dtype, index_dtype, reduction_blocks
from .tuned_configs import lookup


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
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr = False,
    INDEX: tl.constexpr = tl.int64,
):
    """Program b * splits + s reduces tiles s, s + splits, ... of channel (or channels' block) b."""
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    channel, mask = channels_of_block(block, channels, CHANNELS_LAST, BLOCK_COLUMNS)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    if not CHANNELS_LAST:
        tiles *= cut_rows(columns, VECTOR, BLOCK_COLUMNS)[0]

    offsets, load, begin, end, number = locate_tile(
        split,
        block,
        rows,
        channels,
        columns,
        CHANNELS_LAST,
        VECTOR,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        ALIGNED,
        INDEX,
    )
    value = tl.load(input + offsets, mask=load, other=0.0)
    valid = lanes_between(begin, end, CHANNELS_LAST, VECTOR, BLOCK_COLUMNS, ALIGNED)
    shift = sum_over_values(tl.where(valid, value.to(COMPUTE), 0.0), CHANNELS_LAST) / tl.maximum(
        number, 1
    ).to(COMPUTE)
    deviations = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=COMPUTE)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=COMPUTE)
    values = tl.zeros_like(number).to(INDEX)
    for tile in range(split, tiles, splits):
        valid = lanes_between(begin, end, CHANNELS_LAST, VECTOR, BLOCK_COLUMNS, ALIGNED)
        deviation = tl.where(valid, value.to(COMPUTE) - shift, 0.0)
        values += number
        # The next tile is on its way while this one is added up; after the last one, nothing is.
        offsets, load, begin, end, number = locate_tile(
            tile + splits,
            block,
            rows,
            channels,
            columns,
            CHANNELS_LAST,
            VECTOR,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            ALIGNED,
            INDEX,
        )
        value = tl.load(input + offsets, mask=load, other=0.0)
        deviations += deviation
        squares += deviation * deviation

    shift = shift.to(tl.float64)
    deviations = sum_over_values(deviations, CHANNELS_LAST).to(tl.float64)
    squares = sum_over_values(squares, CHANNELS_LAST).to(tl.float64)
    shifted = shift * values.to(tl.float64)
    first, second, last = add_splits(
        shifted + deviations,
        squares + shift * (2.0 * deviations + shifted),
        partials,
        arrivals,
        block,
        channel,
        mask,
        channels,
        split,
        splits,
        SPLIT,
    )
    tl.store(moments + channel, first, mask=mask & last)
    tl.store(moments + channels + channel, second, mask=mask & last)
    count = tl.arange(0, 1).to(tl.int64) + rows
    tl.store(
        moments + 2 * channels + tl.arange(0, 1),
        (count * columns).to(tl.float64),
        mask=last & (block == 0),
    )


def moments(input: torch.Tensor, config: LaunchConfig | None = None) -> torch.Tensor:
    """Moments of each channel of (N, C, *spatial), dense in either layout, of any floating dtype; N
    may be 0.

    Returns float64 [2C + 1]: sum(x) of each channel, sum(x**2) of each channel, values of a
    channel.
    """
    shape = geometry(input)
    config = config or lookup("moments", shape, input.dtype, input.device)
    blocks = reduction_blocks(shape, config)
    output = torch.empty(2 * shape.channels + 1, dtype=torch.float64, device=input.device)
    partials, arrivals = workspace(input, shape.channels, blocks, config.programs)
    moments_kernel[(blocks * config.programs,)](
        output,
        input,
        partials,
        arrivals,
        shape.rows,
        shape.channels,
        shape.columns,
        config.programs,
        CHANNELS_LAST=shape.channels_last,
        VECTOR=shape.vector,
        COMPUTE=compute_dtype(input),
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        SPLIT=config.programs > 1,
        ALIGNED=shape.columns % shape.vector == 0,
        INDEX=index_dtype(shape),
        num_warps=config.num_warps,
    )
    return output
