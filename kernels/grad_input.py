"""grad_input: reads dy and x once, writes dx once.

dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch
(Ioffe and Szegedy 2015, "Batch Normalization", section 3, with the sums of their chain rule
gathered). Like the mean of x, the mean of dy is taken off in two float32 parts.
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


@triton.jit(do_not_specialize=["rows", "channels", "columns", "splits", "reciprocal"])
def grad_input_kernel(
    grad_input,
    grad_output,
    input,
    moments,
    grad_moments,
    weight,
    eps: tl.float64,
    rows,
    channels,
    columns,
    splits,
    reciprocal,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    block, last, first, end = tiles_of_program(
        tl.program_id(0),
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
        grad = tl.load(
            grad_output + offsets, mask=present, other=0.0, eviction_policy="evict_first"
        )
        value = tl.load(input + offsets, mask=present, other=0.0, eviction_policy="evict_first")
    mean, variance, count = mean_and_variance(moments, channel, mask, channels)
    rstd = inverse_root(variance + eps)
    share = inverse(tl.maximum(count, 1.0))
    grad_mean = tl.load(grad_moments + channel, mask=mask, other=0.0) * share
    product_mean = tl.load(grad_moments + channels + channel, mask=mask, other=0.0) * share
    mean_high, mean_low = split_high_low(mean, COMPUTE)
    grad_high, grad_low = split_high_low(grad_mean, COMPUTE)
    # dx = (dy - grad_high) * scale + (x - mean_high) * slope + shift
    scale = load_parameter(weight, channel, mask, 1.0) * rstd
    slope = -scale * rstd * product_mean
    shift = -scale * grad_low - slope * mean_low
    mean_high = spread(mean_high, row, CHANNELS_LAST, SPAN_ROWS)
    grad_high = spread(grad_high, row, CHANNELS_LAST, SPAN_ROWS)
    scale = spread(scale.to(COMPUTE), row, CHANNELS_LAST, SPAN_ROWS)
    slope = spread(slope.to(COMPUTE), row, CHANNELS_LAST, SPAN_ROWS)
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
            grad = tl.load(
                grad_output + offsets, mask=present, other=0.0, eviction_policy="evict_first"
            )
            value = tl.load(input + offsets, mask=present, other=0.0, eviction_policy="evict_first")
        result = (grad.to(COMPUTE) - grad_high) * scale + (
            (value.to(COMPUTE) - mean_high) * slope + shift
        )
        tl.store(grad_input + offsets, cast_down(result, grad_input.dtype.element_ty), mask=present)


def grad_input(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    moments: torch.Tensor,
    grad_moments: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Gradient of the input, like the input (N, C, *spatial); grad_output lies in memory as the
    input does.

    moments: float64 [2C + 1] and grad_moments: float64 [2C], both of the global batch. weight: [C]
    or None.
    """
    shape = geometry(input)
    config = config or lookup("grad_input", shape, input.dtype, input.device)
    output = torch.empty_like(input)
    programs, span_rows, reciprocal, index = output_grid(shape, config)
    if input.numel() == 0:
        return output
    grad_input_kernel[(programs,)](
        output,
        grad_output,
        input,
        moments,
        grad_moments,
        weight,
        eps,
        shape.rows,
        shape.channels,
        shape.columns,
        config.programs,
        reciprocal,
        CHANNELS_LAST=shape.channels_last,
        VECTOR=shape.vector,
        COMPUTE=compute_dtype(input),
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        SPAN_ROWS=span_rows,
        INDEX=index,
        ALIGNED=shape.columns % shape.vector == 0,
        num_warps=config.num_warps,
    )
    return output
