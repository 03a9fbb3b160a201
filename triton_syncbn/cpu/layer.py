"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A small tensor takes as long as its operations are many; in float64 there are no more of them, and
nothing cancels. A large one takes as long as its bytes travel. It stays in float32, which is as
good if sums are formed with care (see sums.py) and if, where means are far from 0 in units of
the deviation, deviations from them are what is added up and scaled.
"""

import torch
from torch import Tensor

from ..operands import NOT_TRACKED, RunningStatistics
from . import small
from .memory import blocks, constant, wide
from .statistics import Statistics, are_near, keep_statistics, statistics_of
from .sums import add_up

GUESSED_FROM = 64  # values: a mean of so many is an eighth of a deviation away


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    values, dtype = input.numel() // input.shape[1], _dtype_of(input)
    count = constant(1, values, torch.float64)
    if small.is_small(input):
        return torch.cat((*small.moments(input), count))
    high = _means_if_far(input) if input.dtype == torch.float32 else None
    total, squares = add_up(None, input, high, dtype)
    is_near = are_near(total, squares, max(values, 1))
    if dtype == torch.float32 and not is_near:
        high = ((total if high is None else total + high.double() * values) / values).float()
        total, squares = add_up(None, input, high, dtype)
    if high is not None:
        shift, deviations, is_near = high.double(), total, False
        total = shift * values + deviations
        squares = squares + shift * (deviations + total)
    moments = torch.cat((total, squares, count))
    if values:
        vars(moments)["is_near"] = is_near
    return moments


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
    statistics = keep_statistics(moments)
    statistics.move(running)
    normalize = small.normalize if small.is_small(input) else _batch_norm
    return normalize(input, statistics, weight, bias, eps)


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
    if small.is_small(input):
        grads, products = small.grad_moments(grad_output, input, statistics, eps)
    else:
        dtype, mean = _dtype_of(input), statistics.mean
        if statistics.is_near:
            grads, products = add_up(grad_output, input, mean, dtype, is_near=True)
        else:
            shift, rest = statistics.shift_and_rest(dtype)
            grads, products = add_up(grad_output, input, shift, dtype)
            products = torch.addcmul(products, grads, rest, value=-1.0)
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
    if small.is_small(input):
        return small.grad_input(grad_output, input, statistics, grad_moments, weight, eps)
    dtype, channels = _dtype_of(input), input.shape[1]
    shift, rest = statistics.shift_and_rest(dtype)
    scale, rounded_scale = statistics.scale(weight, eps, dtype)
    share = scale * (-1.0 / max(statistics.count, 1.0))
    grad_mean, slope = grad_moments[:channels] * share, grad_moments[channels:] * share
    dy = grad_output, rounded_scale
    if not _are_side_by_side(input):
        batch = rest.to(dtype), statistics.variance.to(dtype), eps
        return _write(input, shift, slope.to(dtype), grad_mean.to(dtype), batch, *dy)
    factor = statistics.rstd(eps) * slope
    added = torch.addcmul(grad_mean, factor, rest, value=-1.0)
    return _write(input, shift, factor.to(dtype), added.to(dtype), None, *dy)


def _means_if_far(input: Tensor) -> Tensor | None:
    """Means of the first values of each channel, if they are far from 0 and channels side by side,
    where to find it out takes few calls, and spares a pass.
    """
    channels = input.shape[1]
    if not _are_side_by_side(input) or input.numel() < GUESSED_FROM * channels:
        return None
    rows = input.as_strided((GUESSED_FROM, channels), (channels, 1))
    total, squares = rows.sum(0), (rows * rows).sum(0)
    return None if are_near(total, squares, GUESSED_FROM) else total / GUESSED_FROM


def _dtype_of(input: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _batch_norm(
    input: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """xhat * weight + bias."""
    dtype = _dtype_of(input)
    shift, rest = statistics.shift_and_rest(dtype)
    factor = statistics.scale(weight, eps, dtype)[1]
    # Of the rounded factor, so that its error meets deviations from the mean alone
    added = factor * -rest if bias is None else torch.addcmul(bias, factor, rest, value=-1.0)
    added = added.to(dtype)
    # torch's batch norm takes half precision as well, and rounds at the end. Channels that are
    # side by side are faster without it.
    if _are_side_by_side(input) and not (input.itemsize == 2 and shift is None):
        return _write(input, shift, factor, added, None)
    zero, one = (constant(input.shape[1], value, dtype) for value in (0.0, 1.0))
    return _write(input, shift, factor, added, (zero, one, 0.0))


def _write(
    input: Tensor,
    shift: Tensor | None,
    factor: Tensor,
    added: Tensor,
    batch: tuple[Tensor, Tensor, float] | None,
    grad_output: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """(x - shift) * factor + added, and + dy * scale if there is a dy; the vectors are [C]. With a
    batch's mean, variance and eps, by torch's batch norm, of (x - shift - mean) / deviation.
    """
    dtype = factor.dtype
    output = torch.empty_like(input)
    # Of half precision only before anything can be added, as it rounds at the end
    takes_all = dtype == torch.float32 and shift is None and grad_output is None
    if batch is None:
        takes_all = takes_all and input.dtype == dtype
        factor, added = _per_channel(factor, input), _per_channel(added, input)
    if scale is not None:
        scale = _per_channel(scale, input)
    none = constant(0, 0.0, dtype)
    for values, grad, result in blocks(input, grad_output, output):
        out = result if result.dtype == dtype else None
        deviations = values if takes_all else wide(values, dtype, shift, out=out)
        target = result if takes_all or result.dtype == dtype else deviations
        if batch is None:
            torch.addcmul(added, deviations, factor, out=target)
        else:
            mean, variance, eps = batch
            settings = factor, added, mean, variance, False, 0.0, eps
            torch.native_batch_norm(deviations, *settings, out=(target, none, none))
        if scale is not None:
            target.addcmul_(wide(grad, dtype, None, 1), scale)
        if target is not result:
            result.copy_(target)
    return output


def _are_side_by_side(input: Tensor) -> bool:
    """Whether channels are, in memory."""
    return not input.is_contiguous() or input.numel() == input.shape[0] * input.shape[1]


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (input.dim() - 2))
