"""The four steps on a CPU, in torch's own loops; as `reference` in all but time.

A map goes the way of its geometry. What takes the time of a small one are calls, in float64 as in
float32 (small.py); of others it is bytes as well. Of these the usual ones have a way of few calls
(plain.py), as long as means are near 0 in units of the deviation; the rest has the general one.
"""

import functools

import torch
from torch import Tensor

from ..operands import NOT_TRACKED, RunningStatistics
from . import small
from .general import General
from .plain import Plain
from .small import Small, is_small
from .statistics import keep_statistics, statistics_of

Way = General | Plain | Small  # whose sums, normalize, grad_sums and grad_input are alike


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    way = _ways(input.shape, input.is_contiguous(), input.dtype)[True]
    total, squares, is_near = way.sums(input)
    moments = torch.cat((total, squares, way.count))
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
    way = _ways(input.shape, input.is_contiguous(), input.dtype)[statistics.is_near]
    return way.normalize(input, statistics, weight, bias, eps)


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
    way = _ways(input.shape, input.is_contiguous(), input.dtype)[statistics.is_near]
    grads, products = way.grad_sums(grad_output, input, statistics, eps)
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
    way = _ways(input.shape, input.is_contiguous(), input.dtype)[statistics.is_near]
    return way.grad_input(grad_output, input, statistics, grad_moments, weight, eps)


@functools.lru_cache(maxsize=256)
def _ways(shape: torch.Size, is_contiguous: bool, dtype: torch.dtype) -> tuple[Way, Way]:
    """That of means which may be far, and that of means near 0."""
    if is_small(shape, is_contiguous, small.LARGEST):
        way = Small(shape, is_contiguous)
        return way, way
    general = General(shape, is_contiguous, dtype)
    plain = Plain.of(general, shape, is_contiguous, dtype)
    return general, general if plain is None else plain
