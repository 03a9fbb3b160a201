"""grad_moments: reads dy and x once; writes sum(dy), sum(dy * xhat) of each channel, float64 [2C],
and dweight, dbias.

The sums are those of this rank alone: all-reduced they give the two means in the gradient of the
input, and as they are they are the gradients of bias and weight.
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
from .statistics import cast_down, inverse_root, mean_and_variance, split_high_low
from .tuned_configs import lookup


@triton.jit(do_not_specialize=["rows", "channels", "columns", "splits"])
def grad_moments_kernel(
    grad_moments,
    grad_weight,
    grad_bias,
    grad_output,
    input,
    moments,
    partials,
    arrivals,
    eps: tl.float64,
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

    offsets, load, begin, end, _number = locate_tile(
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
    grad = tl.load(grad_output + offsets, mask=load, other=0.0)
    value = tl.load(input + offsets, mask=load, other=0.0)

    mean, variance, _count = mean_and_variance(moments, channel, mask, channels)
    rstd = inverse_root(variance + eps)
    mean_high, mean_low = split_high_low(mean, COMPUTE)
    offset = (-rstd * mean_low).to(COMPUTE)
    rstd = rstd.to(COMPUTE)

    grads = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=COMPUTE)
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=COMPUTE)
    for tile in range(split, tiles, splits):
        valid = lanes_between(begin, end, CHANNELS_LAST, VECTOR, BLOCK_COLUMNS, ALIGNED)
        this_grad = tl.where(valid, grad.to(COMPUTE), 0.0)
        normalized = (value.to(COMPUTE) - mean_high) * rstd + offset
        product = tl.where(valid, grad.to(COMPUTE) * normalized, 0.0)
        # The next tile is on its way while this one is added up; after the last one, nothing is.
        offsets, load, begin, end, _number = locate_tile(
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
        grad = tl.load(grad_output + offsets, mask=load, other=0.0)
        value = tl.load(input + offsets, mask=load, other=0.0)
        grads += this_grad
        products += product

    first, second, last = add_splits(
        sum_over_values(grads, CHANNELS_LAST).to(tl.float64),
        sum_over_values(products, CHANNELS_LAST).to(tl.float64),
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
    mask = mask & last
    tl.store(grad_moments + channel, first, mask=mask)
    tl.store(grad_moments + channels + channel, second, mask=mask)
    if grad_bias is not None:
        tl.store(grad_bias + channel, cast_down(first, grad_bias.dtype.element_ty), mask=mask)
    if grad_weight is not None:
        tl.store(grad_weight + channel, cast_down(second, grad_weight.dtype.element_ty), mask=mask)


def grad_moments(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    moments: torch.Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the gradient of (N, C, *spatial), which lies in memory as the input does; N may be
    0.

    moments: float64 [2C + 1], of the global batch. Returns float64 [2C], sum(dy) of each channel
    and sum(dy * xhat) of each channel; the gradient of weight, [C] of weight_dtype; that of bias,
    [C] of bias_dtype. A gradient whose dtype is None is not made: its tensor is empty.
    """
    shape = geometry(input)
    config = config or lookup("grad_moments", shape, input.dtype, input.device)
    blocks = reduction_blocks(shape, config)
    output = torch.empty(2 * shape.channels, dtype=torch.float64, device=input.device)
    grad_weight = torch.empty(
        shape.channels if weight_dtype else 0, dtype=weight_dtype, device=input.device
    )
    grad_bias = torch.empty(
        shape.channels if bias_dtype else 0, dtype=bias_dtype, device=input.device
    )
    partials, arrivals = workspace(input, shape.channels, blocks, config.programs)
    grad_moments_kernel[(blocks * config.programs,)](
        output,
        grad_weight if weight_dtype else None,
        grad_bias if bias_dtype else None,
        grad_output,
        input,
        moments,
        partials,
        arrivals,
        eps,
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
    return output, grad_weight, grad_bias
