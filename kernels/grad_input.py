"""grad_input: reads dy and x once, writes dx once.

dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch
(Ioffe and Szegedy 2015, "Batch Normalization", section 3, with the sums of their chain rule
gathered). Like the mean of x, the mean of dy is taken off in two float32 parts.
"""

import torch
import triton
import triton.language as tl

from .indexing import Sizes, geometry
from .launch_config import LaunchConfig, tiling, writer_programs
from .output_indexing import (
    channels_of_walk,
    load_for_the_last_time,
    locate_output_tile,
    spread,
    walk_of_program,
)
from .statistics import (
    convert_to,
    inverse,
    inverse_root,
    load_channels,
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
    TILING: tl.constexpr,
):
    sizes = Sizes(rows, channels, columns)
    walk = walk_of_program(tl.program_id(0), splits, sizes, TILING)
    channel, owner = channels_of_walk(walk, sizes, reciprocal, TILING)
    if not TILING.channels_last:  # the one block is on its way while coefficients are computed
        offsets, mask = locate_output_tile(walk.last, walk.block, sizes, TILING)
        mask = mask & (walk.begin < walk.end)
        grad = load_for_the_last_time(grad_output, offsets, mask)
        value = load_for_the_last_time(input, offsets, mask)
    mean, variance, count = mean_and_variance(moments, channel, sizes)
    rstd = inverse_root(variance + eps)
    inverse_count = inverse(tl.maximum(count, 1.0))
    grad_mean = load_channels(grad_moments, channel) * inverse_count
    product_mean = load_channels(grad_moments + channels, channel) * inverse_count
    mean_high, mean_low = split_high_low(mean, TILING)
    grad_high, grad_low = split_high_low(grad_mean, TILING)
    # dx = (dy - grad_high) * scale + (x - mean_high) * slope + shift
    scale = load_parameter(weight, channel, 1.0) * rstd
    slope = -scale * rstd * product_mean
    shift = -scale * grad_low - slope * mean_low
    mean_high = spread(mean_high, owner, TILING)
    grad_high = spread(grad_high, owner, TILING)
    scale = spread(scale.to(TILING.compute), owner, TILING)
    slope = spread(slope.to(TILING.compute), owner, TILING)
    shift = spread(shift.to(TILING.compute), owner, TILING)
    for step in range(walk.begin, walk.end, splits):
        if TILING.channels_last:
            offsets, mask = locate_output_tile(walk.last - step, walk.block, sizes, TILING)
            grad = load_for_the_last_time(grad_output, offsets, mask)
            value = load_for_the_last_time(input, offsets, mask)
        result = (grad.to(TILING.compute) - grad_high) * scale + (
            (value.to(TILING.compute) - mean_high) * slope + shift
        )
        tl.store(grad_input + offsets, convert_to(result, grad_input.dtype.element_ty), mask=mask)


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
    programs, reciprocal = writer_programs(shape, config)
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
        config.splits,
        reciprocal,
        TILING=tiling(shape, config, input.dtype, writes_map=True),
        num_warps=config.num_warps,
    )
    return output
