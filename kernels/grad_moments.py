"""grad_moments: reads dy and x once; writes sum(dy), sum(dy * xhat) of each channel, float64 [2C],
and dweight, dbias. In a block, see blocks.py, dy is taken before the activation, for which the
gates or the residual are read once.

The sums are those of this rank alone: all-reduced they give the two means in the gradient of the
input, and as they are they are the gradients of bias and weight.
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
from .statistics import (
    convert_to,
    inverse_root,
    load_parameter,
    split_high_low,
    statistics_of_layer,
)


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
    weight,
    bias,
    running_mean,
    running_var,
    residual,
    gates,
    eps: tl.float64,
    rows,
    channels,
    columns,
    splits,
    TILING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program b * splits + s reduces tiles s, s + splits, ... of channel (or channels' block) b."""
    sizes = Sizes(rows, channels, columns)
    part = part_of_program(splits)
    channel = channels_of_block(part.block, sizes, TILING)
    tiles = tiles_of_block(sizes, TILING)

    tile = locate_tile(part.split, part.block, sizes, TILING)
    grad = tl.load(grad_output + tile.offsets, mask=tile.mask, other=0.0)
    value = tl.load(input + tile.offsets, mask=tile.mask, other=0.0)
    added = load_residual(residual, tile, tile.mask, BLOCK)
    kept = load_gates(gates, tile, TILING, BLOCK)

    mean, variance, _count = statistics_of_layer(moments, running_mean, running_var, channel, sizes)
    rstd = inverse_root(variance + eps)
    mean_high, mean_low = split_high_low(mean, TILING)
    offset = (-rstd * mean_low).to(TILING.compute)
    scale = load_parameter(weight, channel, 1.0) * rstd
    shift = (load_parameter(bias, channel, 0.0) - scale * mean_low).to(TILING.compute)
    scale = scale.to(TILING.compute)
    rstd = rstd.to(TILING.compute)

    grads = tl.full(TILING.tile, 0.0, TILING.compute)
    products = tl.full(TILING.tile, 0.0, TILING.compute)
    for number in range(part.split, tiles, splits):
        mask = mask_of_channel(tile, TILING)
        deviation = value.to(TILING.compute) - mean_high
        z = before_activation(deviation, scale, shift, added, TILING, BLOCK)
        this_grad = gradient_of_z(grad.to(TILING.compute), z, kept, TILING, BLOCK)
        normalized = deviation * rstd + offset
        product = tl.where(mask, this_grad * normalized, 0.0)
        this_grad = tl.where(mask, this_grad, 0.0)
        # The next tile is on its way while this one is added up; after the last one, nothing is.
        tile = locate_tile(number + splits, part.block, sizes, TILING)
        grad = tl.load(grad_output + tile.offsets, mask=tile.mask, other=0.0)
        value = tl.load(input + tile.offsets, mask=tile.mask, other=0.0)
        added = load_residual(residual, tile, tile.mask, BLOCK)
        kept = load_gates(gates, tile, TILING, BLOCK)
        grads += this_grad
        products += product

    grad_sum, product_sum, holds_totals = add_splits(
        sum_over_values(grads, TILING).to(tl.float64),
        sum_over_values(products, TILING).to(tl.float64),
        partials,
        arrivals,
        part,
        channel,
        sizes,
    )
    mask = tl.where(holds_totals, channel.mask, False)
    tl.store(grad_moments + channel.index, grad_sum, mask=mask)
    tl.store(grad_moments + channels + channel.index, product_sum, mask=mask)
    if grad_bias is not None:
        sums = convert_to(grad_sum, grad_bias.dtype.element_ty)
        tl.store(grad_bias + channel.index, sums, mask=mask)
    if grad_weight is not None:
        sums = convert_to(product_sum, grad_weight.dtype.element_ty)
        tl.store(grad_weight + channel.index, sums, mask=mask)


def grad_moments(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    moments: torch.Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the gradient of (N, C, *spatial), which lies in memory as the input does; N may be
    0.

    moments: float64 [2C + 1], of the global batch; or None where the running statistics were used.
    block: what follows; the gradient of an activation is taken first. Returns float64 [2C], sum(dy)
    of each channel and sum(dy * xhat) of each channel; the gradient of weight, [C] of weight_dtype;
    that of bias, [C] of bias_dtype. A gradient whose dtype is None is not made: its tensor is
    empty.
    """
    residual, gates = block.residual, block.gates
    plan = plan_of("grad_moments", input, config, residual is not None or gates is not None)
    channels = input.shape[1]
    output = input.new_empty(2 * channels, dtype=torch.float64)
    grad_weight = input.new_empty(channels if weight_dtype else 0, dtype=weight_dtype)
    grad_bias = input.new_empty(channels if bias_dtype else 0, dtype=bias_dtype)
    launch(
        grad_moments_kernel,
        plan.programs,
        plan,
        (
            output,
            grad_weight if weight_dtype else None,
            grad_bias if bias_dtype else None,
            grad_output,
            input,
            moments,
            *workspace(input, channels, plan.blocks, plan.splits),
            block.weight,
            block.bias,
            block.running.mean,
            block.running.var,
            residual,
            gates,
        ),
        (eps,),
        BLOCK=block_of(block, input),
    )
    return output, grad_weight, grad_bias
