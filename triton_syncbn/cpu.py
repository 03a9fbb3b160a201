"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as its operations are many; in float64 there are no more of them, and
nothing cancels. A large one takes as long as its bytes travel. It stays in float32, which is as
good but for two things. Where means are far from 0, in units of the deviation, torch's batch norm
must be given deviations from them. And its backward, which yields both sums of a step at once, adds
up in chains, whose roundings add up, too: where they are long, `torch.sum` adds parts in a tree.
What is made on the way lies in buffers that a thread keeps: fresh pages cost more than arithmetic.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .cpu_memory import blocks, buffer, wide
from .cpu_statistics import Statistics, statistics_of
from .operands import NOT_TRACKED, RunningStatistics

SMALL = 1 << 13  # elements up to which float64 costs nothing, as measured
# Terms of a chain, for moments and for their gradients, by the bytes of a term. Terms of half
# precision have so few digits that more are added up without a rounding, and products of gradients
# have both signs; float64 has digits to spare, but not for moments, which cancel.
LONGEST_CHAIN = {2: (64, 2048), 4: (32, 32), 8: (64, SMALL)}
LANES = 16  # of a vector register: torch has a chain for each, along a row
LONGEST_PART = 256  # values that torch.sum adds up before the sums are added in float64
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    values = input.numel() // input.shape[1]
    count = _vector(1, values, torch.float64)
    total, squares = _sums(None, input, None)
    moments = torch.cat((total, squares, count))
    if _dtype_of(input) == torch.float64 or statistics_of(moments).is_near:
        return moments
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
    statistics = statistics_of(moments)
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
    shift, mean, _ = statistics.in_dtype(_dtype_of(input))
    grads, products = _sums(grad_output, input, mean if shift is None else shift)
    if shift is not None:
        products = torch.addcmul(products, grads, mean, value=-1.0)
    products = products * statistics.rstd(eps)
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
    shift, mean, variance = statistics.in_dtype(dtype)
    settings: Any
    if dtype == torch.float64:
        vectors = [v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias)]
        settings = (*vectors, mean, variance, False, 0.0, eps)
    else:  # float32 factors that are rounded once: of values with mean 0 and variance 1, to torch
        factor = statistics.rstd(eps)
        factor = factor if weight is None else factor * weight
        rest = statistics.mean if shift is None else statistics.mean - shift
        added = factor * -rest if bias is None else torch.addcmul(bias, factor, rest, value=-1.0)
        zero, one = (_vector(input.shape[1], value, dtype) for value in (0.0, 1.0))
        settings = (factor.to(dtype), added.to(dtype), zero, one, False, 0.0, 0.0)
    if scale is not None:
        scale = scale.to(dtype).view(-1, *[1] * (input.dim() - 2))
    output, none = torch.empty_like(input), _vector(0, 0.0, dtype)
    # torch takes half precision as well, and rounds at the end: before anything can be added
    takes_all = dtype == torch.float32 and shift is None and grad_output is None
    for values, grad, result in blocks(input, grad_output, output):
        deviations = values if takes_all else wide(values, dtype, shift)
        target = result if takes_all or result.dtype == dtype else deviations
        torch.native_batch_norm(deviations, *settings, out=(target, none, none))
        if scale is not None:
            target.addcmul_(wide(grad, dtype, None, 1) if grad.itemsize == 2 else grad, scale)
        if target is not result:
            result.copy_(target)
    return output


def _sums(grad_output: Tensor | None, input: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - shift)) of each channel; without a dy it is x - shift itself."""
    dtype, channels = _dtype_of(input), input.shape[1]
    if input.numel() == 0:
        return torch.zeros(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    of_moments, of_gradients = LONGEST_CHAIN[8 if dtype == torch.float64 else input.itemsize]
    if grad_output is None:
        pieces = _pieces(input, of_moments) if shift is None else 0
    else:
        pieces = _pieces(input, of_gradients) if grad_output.dtype == input.dtype else 0
    if pieces:
        map = input.double() if dtype == torch.float64 else input
        grads = map if grad_output is None else grad_output.to(map.dtype)
        one, zero = (_vector(channels * pieces, value, dtype) for value in (1.0, 0.0))
        mean = zero if shift is None else shift
        if pieces > 1:
            map, grads = (each.view(len(input), channels * pieces, -1) for each in (map, grads))
            mean = zero if shift is None else shift.repeat_interleave(pieces)
        settings = (one, mean, one, None, None, False, 0.0, [False, True, True])
        _, second, first = _batch_norm_backward(grads, map, *settings)
        if pieces == 1:
            return first, second
        first, second = (each.view(channels, -1) for each in (first, second))
        return first.sum(1, dtype=torch.float64), second.sum(1, dtype=torch.float64)
    sums: Any = None
    for values, grad in blocks(input, grad_output):
        deviations = wide(values, dtype, shift)
        grad = deviations if grad_output is None else wide(grad, dtype, None, 1)
        target = buffer(values, dtype) if deviations is values else deviations
        first, second = _sum(grad), _sum(torch.mul(deviations, grad, out=target))
        sums = (first, second) if sums is None else (sums[0] + first, sums[1] + second)
    return sums


def _pieces(input: Tensor, longest: int) -> int:
    """Pieces of a row, of which the backward of torch's batch norm adds up as many terms one by one
    at most; or 0 if there are none.
    """
    values = input.numel() // input.shape[1]
    row = values // input.shape[0]
    if row == 1 or not input.is_contiguous():  # a column; torch has a way of its own for others
        return int(input.dim() == 4 and values <= longest)
    if input.itemsize == 2:  # chains go on over all rows of a channel
        return int(values <= longest * LANES)
    least = -(-row // (longest * LANES))
    return next((n for n in range(least, 8 * least) if row % n == 0), 0)


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
    least = -(-values // LONGEST_PART)
    parts = next((n for n in range(least, 8 * least) if values % n == 0), 1)
    part = values // parts
    if by_rows:
        return (samples, channels, parts, part), (channels * row, row, part, 1), 3, (0, 2)
    if parts == 1:
        return (values, channels), (channels, 1), 0, ()
    return (parts, part, channels), (part * channels, channels, 1), 1, (0,)


@functools.lru_cache(maxsize=128)
def _vector(size: int, value: float, dtype: torch.dtype) -> Tensor:
    """So many times a value, in a tensor that nobody changes."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype, device="cpu")
