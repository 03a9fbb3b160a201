"""grad_input: reads dy and x once, writes dx once; in a block, see blocks.py, it reads the gates or
the residual, too, and writes the gradient of the residual.

dx = weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch
(Ioffe and Szegedy 2015, "Batch Normalization", section 3, with the sums of their chain rule
gathered). Like the mean of x, the mean of dy is taken off in two float32 parts.
"""

import torch
import triton
import triton.language as tl

from triton_syncbn.operands import LAYER_ALONE, BlockOperands

from .blocks import (
    before_activation,
    block_of,
    gradient_of_z,
    load_gates,
    load_residual,
)
from .indexing import Sizes
from .launch import launch, plan_of
from .launch_config import LaunchConfig
from .output_indexing import (
    block_exists,
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
    split_high_low,
    statistics_of_layer,
)


@triton.jit(do_not_specialize=["rows", "channels", "columns", "splits", "reciprocal"])
def grad_input_kernel(
    grad_input,
    grad_output,
    input,
    moments,
    grad_moments,
    weight,
    bias,
    running_mean,
    running_var,
    grad_residual,
    residual,
    gates,
    eps: tl.float64,
    rows,
    channels,
    columns,
    splits,
    reciprocal,
    TILING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sizes = Sizes(rows, channels, columns)
    walk = walk_of_program(tl.program_id(0), splits, sizes, TILING)
    channel, owner = channels_of_walk(walk, sizes, reciprocal, TILING)
    if not TILING.channels_last:  # the one block is on its way while coefficients are computed
        tile = locate_output_tile(walk.last, walk.block, sizes, TILING)
        mask = tile.mask & block_exists(walk)
        grad = load_for_the_last_time(grad_output, tile.offsets, mask)
        value = load_for_the_last_time(input, tile.offsets, mask)
        added = load_residual(residual, tile, mask, BLOCK)
        kept = load_gates(gates, tile, TILING, BLOCK)
    mean, variance, count = statistics_of_layer(moments, running_mean, running_var, channel, sizes)
    rstd = inverse_root(variance + eps)
    if moments is None:  # the statistics are fixed: the batch has no part in them
        grad_mean = tl.zeros_like(mean)
        product_mean = tl.zeros_like(mean)
    else:
        inverse_count = inverse(tl.maximum(count, 1.0))
        grad_mean = load_channels(grad_moments, channel) * inverse_count
        product_mean = load_channels(grad_moments + channels, channel) * inverse_count
    mean_high, mean_low = split_high_low(mean, TILING)
    grad_high, grad_low = split_high_low(grad_mean, TILING)
    # dx = (dy - grad_high) * scale + (x - mean_high) * slope + shift
    scale = load_parameter(weight, channel, 1.0) * rstd
    slope = -scale * rstd * product_mean
    shift = -scale * grad_low - slope * mean_low
    z_shift = load_parameter(bias, channel, 0.0) - scale * mean_low
    mean_high = spread(mean_high, owner, TILING)
    grad_high = spread(grad_high, owner, TILING)
    scale = spread(scale.to(TILING.compute), owner, TILING)
    slope = spread(slope.to(TILING.compute), owner, TILING)
    shift = spread(shift.to(TILING.compute), owner, TILING)
    z_shift = spread(z_shift.to(TILING.compute), owner, TILING)
    for step in range(walk.begin, walk.end, splits):
        if TILING.channels_last:
            tile = locate_output_tile(walk.last - step, walk.block, sizes, TILING)
            mask = tile.mask
            grad = load_for_the_last_time(grad_output, tile.offsets, mask)
            value = load_for_the_last_time(input, tile.offsets, mask)
            added = load_residual(residual, tile, mask, BLOCK)
            kept = load_gates(gates, tile, TILING, BLOCK)
        deviation = value.to(TILING.compute) - mean_high
        z = before_activation(deviation, scale, z_shift, added, TILING, BLOCK)
        grad_z = gradient_of_z(grad.to(TILING.compute), z, kept, TILING, BLOCK)
        result = (grad_z - grad_high) * scale + (deviation * slope + shift)
        result = convert_to(result, grad_input.dtype.element_ty)
        tl.store(grad_input + tile.offsets, result, mask=mask)
        if grad_residual is not None:
            result = convert_to(grad_z, grad_residual.dtype.element_ty)
            tl.store(grad_residual + tile.offsets, result, mask=mask)


def grad_input(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    moments: torch.Tensor | None,
    grad_moments: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Gradient of the input, like the input (N, C, *spatial); grad_output lies in memory as the
    input does.

    moments: float64 [2C + 1] and grad_moments: float64 [2C], both of the global batch; or both None
    where the running statistics were used. weight: [C] or None. block: what follows; the gradient
    before its activation is written to its grad_residual, if there is one.
    """
    residual, gates = block.residual, block.gates
    plan = plan_of("grad_input", input, config, residual is not None or gates is not None)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    launch(
        grad_input_kernel,
        plan.programs,
        plan,
        (
            output,
            grad_output,
            input,
            moments,
            grad_moments,
            weight,
            block.bias,
            block.running.mean,
            block.running.var,
            block.grad_residual,
            residual,
            gates,
        ),
        (eps,),
        BLOCK=block_of(block, input),
    )
    return output
