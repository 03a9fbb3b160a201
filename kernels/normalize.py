"""normalize: reads x once, writes y once; one more program updates the running statistics and the
batch counter.

y = (x - mean) * rstd * weight + bias, with mean and rstd from the all-reduced moments. The mean is
kept as two float32 numbers, so that x - mean is exact to the last digit of float32 wherever the
mean lies.

The blocks are walked from the end of the tensor: what the moments kernel read last is still in the
cache.
"""

import torch
import triton
import triton.language as tl

from .indexing import geometry
from .launch_config import LaunchConfig, compute_dtype, output_grid
from .output_indexing import (
    channels_of_tile,
    locate_output_tile,
    spread,
    tiles_of_program,
)
from .statistics import (
    cast_down,
    inverse,
    inverse_root,
    load_parameter,
    mean_and_variance,
    split_high_low,
)
from .tuned_configs import lookup

STATISTICS_BLOCK = 256  # channels that the program of the running statistics handles at once


@triton.jit
def update_running_statistics(
    running_mean,
    running_var,
    num_batches_tracked,
    moments,
    momentum,
    channels,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """r += f * (batch - r), f = momentum or, if CUMULATIVE, 1 / batches so far; nothing moves after
    an empty batch.
    """
    count = tl.load(moments + 2 * channels)
    factor = momentum
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked).to(tl.float64) + 1.0
        if num_batches_tracked.dtype.element_ty.is_floating():
            counted = cast_down(batches, num_batches_tracked.dtype.element_ty)
        else:
            counted = batches.to(num_batches_tracked.dtype.element_ty)
        tl.store(num_batches_tracked, counted, mask=count > 0.0)
        if CUMULATIVE:
            factor = inverse(batches)
    if running_mean is not None:
        unbias = count * inverse(tl.maximum(count - 1.0, 1.0))
        updated = tl.where(count > 0.0, channels, 0)
        for first in range(0, updated, BLOCK):
            channel = first + tl.arange(0, BLOCK)
            mask = channel < updated
            mean, variance, _count = mean_and_variance(moments, channel, mask, channels)
            update_buffer(running_mean + channel, mean, factor, mask)
            update_buffer(running_var + channel, variance * unbias, factor, mask)


@triton.jit
def update_buffer(running, batch, factor, mask):
    """Move values in a buffer of any dtype towards those of the batch, in float64; with a factor of
    1 they become those of the batch, to the last digit.
    """
    old = tl.load(running, mask=mask, other=0.0).to(tl.float64)
    new = tl.fma(batch, tl.zeros_like(old) + factor, (1.0 - factor) * old)
    tl.store(running, cast_down(new, running.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "channels", "columns", "splits", "reciprocal"])
def normalize_kernel(
    output,
    input,
    moments,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    momentum: tl.float64,
    eps: tl.float64,
    rows,
    channels,
    columns,
    splits,
    reciprocal,
    CUMULATIVE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    STATISTICS_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Program 0 updates the running statistics, the others write y."""
    program = tl.program_id(0) - 1
    if program < 0:
        update_running_statistics(
            running_mean,
            running_var,
            num_batches_tracked,
            moments,
            momentum,
            channels,
            CUMULATIVE,
            STATISTICS_BLOCK,
        )
    else:
        block, last, first, end = tiles_of_program(
            program,
            rows,
            channels,
            columns,
            splits,
            CHANNELS_LAST,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            INDEX,
        )
        channel, mask, row = channels_of_tile(
            last,
            block,
            channels,
            columns,
            reciprocal,
            CHANNELS_LAST,
            VECTOR,
            BLOCK_COLUMNS,
            SPAN_ROWS,
            INDEX,
            ALIGNED,
        )
        if not CHANNELS_LAST:  # the one block is on its way while coefficients are computed
            offsets, present = locate_output_tile(
                last,
                block,
                rows,
                channels,
                columns,
                CHANNELS_LAST,
                VECTOR,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                INDEX,
            )
            present = present & (first < end)
            value = tl.load(input + offsets, mask=present, other=0.0, eviction_policy="evict_first")
        mean, variance, _count = mean_and_variance(moments, channel, mask, channels)
        scale = load_parameter(weight, channel, mask, 1.0) * inverse_root(variance + eps)
        mean_high, mean_low = split_high_low(mean, COMPUTE)
        # y = (x - mean_high) * scale + shift
        shift = load_parameter(bias, channel, mask, 0.0) - scale * mean_low
        mean_high = spread(mean_high, row, CHANNELS_LAST, SPAN_ROWS)
        scale = spread(scale.to(COMPUTE), row, CHANNELS_LAST, SPAN_ROWS)
        shift = spread(shift.to(COMPUTE), row, CHANNELS_LAST, SPAN_ROWS)
        for number in range(first, end, splits):
            if CHANNELS_LAST:
                offsets, present = locate_output_tile(
                    last - number,
                    block,
                    rows,
                    channels,
                    columns,
                    CHANNELS_LAST,
                    VECTOR,
                    BLOCK_ROWS,
                    BLOCK_COLUMNS,
                    INDEX,
                )
                value = tl.load(
                    input + offsets, mask=present, other=0.0, eviction_policy="evict_first"
                )
            normalized = (value.to(COMPUTE) - mean_high) * scale + shift
            tl.store(output + offsets, cast_down(normalized, output.dtype.element_ty), mask=present)


def normalize(
    input: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    momentum: float | None = None,
    eps: float,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Normalize (N, C, *spatial), dense in either layout; N may be 0.

    moments: float64 [2C + 1], of the global batch. weight, bias, running_mean, running_var: [C] of
    any floating dtype, or None. num_batches_tracked: one number of any dtype, or None; needed if
    momentum is None. The running statistics and the counter are updated in place unless the global
    batch is empty. Returns y, like the input.
    """
    shape = geometry(input)
    config = config or lookup("normalize", shape, input.dtype, input.device)
    output = torch.empty_like(input)
    programs, span_rows, reciprocal, index = output_grid(shape, config)
    normalize_kernel[(programs + 1,)](
        output,
        input,
        moments,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        0.0 if momentum is None else momentum,
        eps,
        shape.rows,
        shape.channels,
        shape.columns,
        config.programs,
        reciprocal,
        CUMULATIVE=momentum is None,
        CHANNELS_LAST=shape.channels_last,
        VECTOR=shape.vector,
        COMPUTE=compute_dtype(input),
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        SPAN_ROWS=span_rows,
        INDEX=index,
        STATISTICS_BLOCK=STATISTICS_BLOCK,
        ALIGNED=shape.columns % shape.vector == 0,
        num_warps=config.num_warps,
    )
    return output
