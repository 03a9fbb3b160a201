"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as its operations are many; in float64 there are no more of them, and
nothing cancels. A large one takes as long as its bytes travel. It stays in float32, which is as
good but for two things. Where means are far from 0, in units of the deviation, sums and factors
must be those of deviations from them. And the backward of torch's batch norm, which yields both
sums of a step at once, adds up in chains, whose roundings add up, too: it is given a map in pieces,
or, where they would have to be too short, `torch.sum` adds parts in a tree.
What is made on the way lies in buffers that a thread keeps: fresh pages cost more than arithmetic.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu_memory import blocks, buffer, wide
from .cpu_statistics import Statistics, are_near, keep_statistics, statistics_of
from .operands import NOT_TRACKED, RunningStatistics

SMALL = 1 << 13  # elements up to which float64 costs nothing, as measured
# Terms of a chain, for moments and for their gradients, by the bytes of a term. Terms of half
# precision have so few digits that more are added up without a rounding, and products of gradients
# have both signs; float64 has digits to spare, but not for moments, which cancel.
LONGEST_CHAIN = {2: (64, 2048), 4: (32, 32), 8: (64, SMALL)}
LANES = 16  # of a vector register: torch has a chain for each, along a row
MOST_CHAINS = (
    1 << 12
)  # side by side, of channels that are: the sums of more leave the fastest cache
LONGEST_PART = 256  # values that torch.sum adds up before the sums are added in float64
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    values = input.numel() // input.shape[1]
    count = _vector(1, values, torch.float64)
    total, squares = _sums(None, input, None)
    if _dtype_of(input) == torch.float64 or are_near(total, squares, values):
        return torch.cat((total, squares, count))
    high = (total / values).float()
    deviations, squares = _sums(None, input, high)
    shift = high.double()
    total = shift * values + deviations
    return torch.cat((total, shift * (deviations + total) + squares, count))


def normalize(
    input: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    running: RunningStatistics = NOT_TRACKED,
) -> Tensor:
    """Normalize with the global moments; move the running statistics unless the batch is empty."""
    running_mean, running_var, num_batches_tracked, momentum = running
    statistics = keep_statistics(moments)
    if (count := statistics.count) > 0.0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            if momentum is None:
                assert num_batches_tracked is not None
                momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
            unbiased = momentum * count / max(count - 1.0, 1.0)
            kept = 1.0 - momentum  # added in float64, which is rounded once
            torch.add(statistics.mean * momentum, running_mean, alpha=kept, out=running_mean)
            torch.add(statistics.variance * unbiased, running_var, alpha=kept, out=running_var)
    return _batch_norm(input, statistics, weight, bias, eps)


def grad_moments(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [2C]; gradients of weight and bias."""
    statistics = statistics_of(moments)
    shift, rest = statistics.shift_and_rest(_dtype_of(input))
    grads, products = _sums(grad_output, input, shift)
    products = torch.addcmul(products, grads, rest, value=-1.0).mul_(statistics.rstd(eps))
    return (
        torch.cat((grads, products)),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype),
    )


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    grad_moments: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch."""
    statistics = statistics_of(moments)
    scale = statistics.rstd(eps)
    if weight is not None:
        scale = scale * weight
    grad_mean, slope = grad_moments.view(2, -1) * (scale * (-1.0 / max(statistics.count, 1.0)))
    return _batch_norm(input, statistics, slope, grad_mean, eps, grad_output, scale)


def _dtype_of(input: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    in_float32 = input.numel() > SMALL and input.dtype != torch.float64
    return torch.float32 if in_float32 else torch.float64


def _batch_norm(
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_output: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """xhat * weight + bias, and + dy * scale if there is a dy; the other vectors are [C]."""
    dtype = _dtype_of(input)
    shift, rest = statistics.shift_and_rest(dtype)
    factor = statistics.rstd(eps)
    factor = factor if weight is None else factor * weight
    added = factor * -rest if bias is None else torch.addcmul(bias, factor, rest, value=-1.0)
    factor, added = factor.to(dtype), added.to(dtype)  # rounded once
    output = torch.empty_like(input)
    # torch's batch norm takes half precision as well, and rounds at the end: before anything can be
    # added. Channels that are side by side are faster without it.
    takes_all = dtype == torch.float32 and shift is None and grad_output is None
    side_by_side = _are_side_by_side(input) and not (takes_all and input.itemsize == 2)
    if side_by_side:
        factor, added = _per_channel(factor, input), _per_channel(added, input)
    else:
        zero, one, none = (
            _vector(size, value, dtype)
            for size, value in ((input.shape[1], 0.0), (input.shape[1], 1.0), (0, 0.0))
        )
    if scale is not None:
        scale = _per_channel(scale.to(dtype), input)
    for values, grad, result in blocks(input, grad_output, output):
        deviations = values if takes_all else wide(values, dtype, shift)
        target = result if takes_all or result.dtype == dtype else deviations
        if side_by_side:
            torch.addcmul(added, deviations, factor, out=target)
        else:  # of values with mean 0 and variance 1, to torch
            settings = factor, added, zero, one, False, 0.0, 0.0
            torch.native_batch_norm(deviations, *settings, out=(target, none, none))
        if scale is not None:
            target.addcmul_(wide(grad, dtype, None, 1), scale)
        if target is not result:
            result.copy_(target)
    return output


def _sums(grad_output: Tensor | None, input: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel; without a dy it is x - shift itself."""
    dtype, channels = _dtype_of(input), input.shape[1]
    if input.numel() == 0:
        return torch.zeros(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    of_moments = grad_output is None
    # torch's batch norm takes half precision as it is, if it takes all of it
    as_it_is = dtype == torch.float32 and (
        shift is None if grad_output is None else grad_output.dtype == input.dtype
    )
    bytes_of_term = input.itemsize if as_it_is else dtype.itemsize
    longest = LONGEST_CHAIN[bytes_of_term][0 if of_moments else 1]
    sums: Any = None
    for values, grad in blocks(input, grad_output):
        chains = _chains(values.shape, values.is_contiguous(), longest, bytes_of_term)
        mean = None if of_moments or chains is None else shift  # taken off by torch's batch norm
        deviations = values
        if not as_it_is or chains is None:
            deviations = wide(values, dtype, shift if mean is None else None)
            grad = deviations if of_moments else wide(grad, dtype, None, 1)
        if chains is not None:
            first, second = _sums_in_chains(grad, deviations, mean, chains)
        else:
            target = buffer(values, dtype) if deviations is values else deviations
            first, second = _sum(grad), _sum(torch.mul(deviations, grad, out=target))
        if sums is not None:  # of several blocks, in float64
            first, second = first + sums[0].double(), second + sums[1].double()
        sums = first, second
    return sums


class Chains(NamedTuple):
    """Memory as a map whose channels are pieces of those that there are."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    table: tuple[int, int]  # of its channels: those that there are, and the pieces of each
    pieces: int  # the dimension of the table


def _sums_in_chains(
    grad: Tensor, map: Tensor, mean: Tensor | None, chains: Chains
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each channel; float64 [C], if it has pieces."""
    size, strides, table, dimension = chains
    channels, dtype = table[0] * table[1], torch.promote_types(map.dtype, torch.float32)
    one = _vector(channels, 1.0, dtype)
    if mean is None:
        mean = _vector(channels, 0.0, dtype)
    elif table[dimension] > 1:
        mean = mean.unsqueeze(dimension).expand(table).reshape(-1)
    map, grad = map.as_strided(size, strides), grad.as_strided(size, strides)
    settings = (one, mean, one, None, None, False, 0.0, [False, True, True])
    _, second, first = _batch_norm_backward(grad, map, *settings)
    if table[dimension] == 1:
        return first, second
    return tuple(each.view(table).sum(dimension, dtype=torch.float64) for each in (first, second))


@functools.lru_cache(maxsize=256)
def _chains(
    shape: torch.Size, is_contiguous: bool, longest: int, bytes_of_term: int
) -> Chains | None:
    """Pieces of which the backward of torch's batch norm adds up so many terms one by one at most;
    None if there are none.
    """
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    if is_contiguous and row > 1:
        if bytes_of_term == 2:  # chains go on over all rows of a channel
            pieces = int(samples * row <= longest * LANES)
        else:
            pieces = _divisor(row, -(-row // (longest * LANES)))
        if not pieces:
            return None
        size = samples, channels * pieces, row // pieces
        return Chains(size, (channels * row, row // pieces, 1), (channels, pieces), 1)
    values = samples * row
    pieces = _divisor(values, -(-values // longest))
    width = channels * pieces
    if not pieces or (pieces > 1 and width > MOST_CHAINS):
        return None
    size = 1, width, values // pieces, 1
    return Chains(size, (values * channels, 1, width, width), (pieces, channels), 0)


def _divisor(number: int, least: int) -> int:
    """One that is not much larger than the least; or 0 if there is none."""
    return next((n for n in range(least, 8 * least) if number % n == 0), 0)


def _sum(map: Tensor) -> Tensor:
    """Of each channel of a dense map; float64 [C], if there is more than one part."""
    size, strides, within, between = _parts(map.shape, map.is_contiguous())
    sums = map.as_strided(size, strides).sum(within)
    return sums.sum(between, dtype=torch.float64) if between else sums


@functools.lru_cache(maxsize=256)
def _parts(shape: torch.Size, is_contiguous: bool) -> tuple[Any, ...]:
    """Memory with each channel in parts: size, strides, dimensions within and between the parts."""
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    by_rows = is_contiguous and row > 1
    values = row if by_rows else samples * row
    parts = _divisor(values, -(-values // LONGEST_PART)) or 1
    part = values // parts
    if by_rows:
        return (samples, channels, parts, part), (channels * row, row, part, 1), 3, (0, 2)
    if parts == 1:
        return (values, channels), (channels, 1), 0, ()
    return (parts, part, channels), (part * channels, channels, 1), 1, (0,)


def _are_side_by_side(input: Tensor) -> bool:
    """Whether channels are, in memory."""
    return not input.is_contiguous() or input.numel() == input.shape[0] * input.shape[1]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (input.dim() - 2))


@functools.lru_cache(maxsize=128)
def _vector(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """So many times a value, in a tensor that nobody changes."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")
