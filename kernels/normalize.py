"""normalize: reads x once, writes y once; some more programs update the running statistics and the
batch counter. A residual is read once; gates are written once.

y = activation((x - mean) * rstd * weight + bias + residual), with mean and rstd from the
all-reduced moments, or from the running statistics where there are none. The mean is kept as two
float32 numbers, so that x - mean is exact to the last digit of float32 wherever the mean lies.

The blocks are walked from the end of the tensor: what the moments kernel read last is still in the
cache.
"""

import functools

import torch
import triton
import triton.language as tl

from triton_syncbn.operands import (
    LAYER_ALONE,
    NOT_TRACKED,
    BlockOperands,
    RunningStatistics,
)

from .blocks import before_activation, block_of, load_residual, store_gates
from .indexing import Channels, Sizes
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
    mean_and_variance,
    split_high_low,
    statistics_of_layer,
)

CHANNELS_OF_STATISTICS = tl.constexpr(256)  # whose running statistics a program updates at once


@triton.jit
def update_running_statistics(
    running_mean,
    running_var,
    num_batches_tracked,
    moments,
    momentum,
    programs,
    sizes,
    CUMULATIVE: tl.constexpr,
):
    """r += f * (batch - r), f = momentum or, if CUMULATIVE, 1 / batches so far; nothing moves after
    an empty batch. Of the first `programs` each has some channels; program 0 moves the counter.
    """
    program = tl.program_id(0)
    count = tl.load(moments + 2 * sizes.channels)
    factor = momentum
    if num_batches_tracked is not None:
        counts = program == 0
        batches = tl.load(num_batches_tracked, mask=counts, other=0).to(tl.float64) + 1.0
        if num_batches_tracked.dtype.element_ty.is_floating():
            counted = convert_to(batches, num_batches_tracked.dtype.element_ty)
        else:
            counted = batches.to(num_batches_tracked.dtype.element_ty)
        tl.debug_barrier()  # every thread has read the counter before one moves it
        tl.store(num_batches_tracked, counted, mask=counts & (count > 0.0))
        if CUMULATIVE:
            factor = inverse(batches)
    if running_mean is not None:
        unbias = count * inverse(tl.maximum(count - 1.0, 1.0))
        updated = tl.where(count > 0.0, sizes.channels, 0)
        BLOCK: tl.constexpr = CHANNELS_OF_STATISTICS
        for first in range(program * BLOCK, updated, programs * BLOCK):
            index = first + tl.arange(0, BLOCK)
            channel = Channels(index, index < updated)
            mean, variance, _count = mean_and_variance(moments, channel, sizes)
            update_buffer(running_mean, mean, factor, channel)
            update_buffer(running_var, variance * unbias, factor, channel)


@triton.jit
def update_buffer(running, batch, factor, channel):
    """Move values in a buffer of any dtype towards those of the batch, in float64; with a factor of
    1 they become those of the batch, to the last digit.
    """
    old = load_channels(running, channel).to(tl.float64)
    new = tl.fma(batch, tl.zeros_like(old) + factor, (1.0 - factor) * old)
    new = convert_to(new, running.dtype.element_ty)
    tl.store(running + channel.index, new, mask=channel.mask)


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
    residual,
    gates,
    momentum: tl.float64,
    eps: tl.float64,
    rows,
    channels,
    columns,
    splits,
    reciprocal,
    CUMULATIVE: tl.constexpr,
    TILING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs update running statistics, if there are moments; the others write y."""
    sizes = Sizes(rows, channels, columns)
    updating = 1  # reads the counter that it moves
    if not CUMULATIVE:
        updating = tl.maximum(tl.cdiv(channels, CHANNELS_OF_STATISTICS), 1)
    program = tl.program_id(0) - updating
    if program < 0:
        if moments is not None:
            # In the interpreter it is a Python number, which a call would round to float32.
            factor = tl.full((), momentum, tl.float64)
            update_running_statistics(
                running_mean,
                running_var,
                num_batches_tracked,
                moments,
                factor,
                updating,
                sizes,
                CUMULATIVE,
            )
    else:
        walk = walk_of_program(program, splits, sizes, TILING)
        channel, owner = channels_of_walk(walk, sizes, reciprocal, TILING)
        if not TILING.channels_last:  # the one block is on its way while coefficients are computed
            tile = locate_output_tile(walk.last, walk.block, sizes, TILING)
            mask = tile.mask & block_exists(walk)
            value = load_for_the_last_time(input, tile.offsets, mask)
            added = load_residual(residual, tile, mask, BLOCK)
        mean, variance, _count = statistics_of_layer(
            moments, running_mean, running_var, channel, sizes
        )
        scale = load_parameter(weight, channel, 1.0) * inverse_root(variance + eps)
        mean_high, mean_low = split_high_low(mean, TILING)
        # y = (x - mean_high) * scale + shift
        shift = load_parameter(bias, channel, 0.0) - scale * mean_low
        mean_high = spread(mean_high, owner, TILING)
        scale = spread(scale.to(TILING.compute), owner, TILING)
        shift = spread(shift.to(TILING.compute), owner, TILING)
        for step in range(walk.begin, walk.end, splits):
            if TILING.channels_last:
                tile = locate_output_tile(walk.last - step, walk.block, sizes, TILING)
                mask = tile.mask
                value = load_for_the_last_time(input, tile.offsets, mask)
                added = load_residual(residual, tile, mask, BLOCK)
            deviation = value.to(TILING.compute) - mean_high
            z = before_activation(deviation, scale, shift, added, TILING, BLOCK)
            if BLOCK.gates_of_byte > 0:
                store_gates(gates, z, tile, TILING, BLOCK)
            result = z if BLOCK.activate is None else BLOCK.activate(z, BLOCK.slope)
            result = convert_to(result, output.dtype.element_ty)
            tl.store(output + tile.offsets, result, mask=mask)


@functools.cache
def _updating(channels: int, cumulative: bool) -> int:
    """Programs that update running statistics."""
    return 1 if cumulative else max(triton.cdiv(channels, CHANNELS_OF_STATISTICS.value), 1)


def normalize(
    input: torch.Tensor,
    moments: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    running: RunningStatistics = NOT_TRACKED,
    block: BlockOperands = LAYER_ALONE,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Normalize (N, C, *spatial), dense in either layout; N may be 0.

    moments: float64 [2C + 1], of the global batch; or None, to normalize with the running
    statistics, which stay. weight, bias: [C] of any floating dtype, or None. running: updated in
    place unless the global batch is empty. block: what follows; its gates are written, if there are
    any. Returns y, like the input.
    """
    residual, gates = block.residual, block.gates
    plan = plan_of("normalize", input, config, residual is not None or gates is not None)
    output = torch.empty_like(input)
    mean, var, num_batches_tracked, momentum = running
    launch(
        normalize_kernel,
        plan.programs + _updating(input.shape[1], momentum is None),
        plan,
        (output, input, moments, weight, bias, mean, var, num_batches_tracked, residual, gates),
        (0.0 if momentum is None else momentum, eps),
        CUMULATIVE=momentum is None,
        BLOCK=block_of(block, input),
    )
    return output
