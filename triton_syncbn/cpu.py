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
from typing import NamedTuple

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
    values, dtype = input.numel() // input.shape[1], _dtype_of(input)
    sums = _sums(None, input, None, dtype)
    if dtype == torch.float32:
        total, squares = sums[0], sums[1]
        if not are_near(total, squares, values):
            high = (total / values).float()
            deviations, squares = _sums(None, input, high, dtype)
            shift = high.double()
            total = shift * values + deviations
            sums = torch.stack((total, shift * (deviations + total) + squares))
    return torch.cat((sums.view(-1), _vector(1, values, torch.float64)))


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
    statistics, dtype = statistics_of(moments), _dtype_of(input)
    shift, rest = statistics.shift_and_rest(dtype)
    sums = _sums(grad_output, input, shift, dtype)
    grads, products = sums[0], sums[1]
    products.addcmul_(grads, rest, value=-1.0).mul_(statistics.rstd(eps))
    return (
        sums.view(-1),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype, copy=True),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype, copy=True),
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


def _sums(
    grad_output: Tensor | None, input: Tensor, shift: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """sum(dy) and sum(dy * (x - shift)) of each channel, float64 [2, C], with arithmetic of a
    dtype; without a dy it is x - shift itself.
    """
    of_moments = grad_output is None
    # torch's batch norm takes half precision as it is, if it takes all of it
    as_it_is = dtype == torch.float32 and (
        shift is None if grad_output is None else grad_output.dtype == input.dtype
    )
    bytes_of_term = input.itemsize if as_it_is else dtype.itemsize
    longest = LONGEST_CHAIN[bytes_of_term][0 if of_moments else 1]
    sums = None
    for values, grad in blocks(input, grad_output):
        pieces = _pieces(values.shape, values.is_contiguous(), longest, bytes_of_term)
        mean = None if of_moments or pieces.within else shift  # taken off by torch's batch norm
        original = values
        if pieces.within or not as_it_is:
            values = wide(values, dtype, shift if mean is None else None)
            grad = grad if of_moments else wide(grad, dtype, None, 1)
        is_fresh = values is not original
        values = values.as_strided(pieces.size, pieces.strides)
        grad = values if of_moments else grad.as_strided(pieces.size, pieces.strides)
        if pieces.within:
            first = grad.sum(pieces.within)
            target = values if is_fresh else buffer(values, dtype)
            second = torch.mul(values, grad, out=target).sum(pieces.within)
        else:
            first, second = _sums_in_chains(grad, values, mean, pieces, dtype)
        pair = torch.stack((first, second)).view(2, *pieces.sums)
        pair = pair.sum(pieces.between, dtype=torch.float64) if pieces.between else pair.double()
        sums = pair if sums is None else sums.add_(pair)
    return torch.zeros(2, input.shape[1], dtype=torch.float64) if sums is None else sums


class Pieces(NamedTuple):
    """Memory of a map in pieces, of which each makes a sum."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    within: tuple[int, ...]  # dimensions to sum over; none if torch's batch norm does it in chains
    sums: tuple[int, ...]  # their size, with one dimension of channels
    between: tuple[int, ...]  # dimensions of pairs of sums to sum over, after that of the pair


def _sums_in_chains(
    grad: Tensor, map: Tensor, mean: Tensor | None, pieces: Pieces, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each piece, which has a channel of its own."""
    channels = map.shape[1]
    one = _vector(channels, 1.0, dtype)
    if mean is None:
        mean = _vector(channels, 0.0, dtype)
    elif pieces.between:
        mean = mean.unsqueeze(pieces.between[0] - 1).expand(pieces.sums).reshape(-1)
    settings = (one, mean, one, None, None, False, 0.0, [False, True, True])
    _, second, first = _batch_norm_backward(grad, map, *settings)
    return first, second


@functools.lru_cache(maxsize=256)
def _pieces(shape: torch.Size, is_contiguous: bool, longest: int, bytes_of_term: int) -> Pieces:
    """Those of which the backward of torch's batch norm adds up so many terms one by one at most,
    if there are any.
    """
    samples, channels, row = shape[0], shape[1], math.prod(shape[2:])
    values = samples * row
    if is_contiguous and row > 1:
        number = _divisor(row, -(-row // (longest * LANES)))
        if bytes_of_term == 2:  # chains go on over all rows of a channel
            number = int(values <= longest * LANES)
        width, part = channels * number, row // max(number, 1)
        if number:
            in_chains = (samples, width, part), (channels * row, part, 1), ()
            return Pieces(*in_chains, *_between(channels, number, dimension=1))
        number = _divisor(row, -(-row // LONGEST_PART)) or 1
        part = row // number
        size, strides = (samples, channels, number, part), (channels * row, row, part, 1)
        return Pieces(size, strides, (3,), size[:3], (1, 3))
    number = _divisor(values, -(-values // longest))
    width, part = channels * number, values // max(number, 1)
    if number == 1 or 0 < width <= MOST_CHAINS:
        in_chains = (1, width, part, 1), (values * channels, 1, width, width), ()
        return Pieces(*in_chains, *_between(number, channels, dimension=0))
    number = _divisor(values, -(-values // LONGEST_PART)) or 1
    part = values // number
    size, strides = (number, part, channels), (part * channels, channels, 1)
    return Pieces(size, strides, (1,), (number, channels), (1,))


def _between(*sums: int, dimension: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The size of sums, and the dimension of a pair of them to sum over, if it is needed."""
    return (sums, (1 + dimension,)) if sums[dimension] > 1 else ((sums[1 - dimension],), ())


def _divisor(number: int, least: int) -> int:
    """One that is not much larger than the least; or 0 if there is none."""
    return next((n for n in range(least, 8 * least) if number % n == 0), 0)


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
