"""Small maps on a CPU, in as few calls as there can be, which take the time of a step.

Torch's batch norm is exact in float64, and keeps a layout that is contiguous, or of four
dimensions. To a process that is alone, where no sums travel between the steps, it does a pass in
one call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import RunningStatistics
from .memory import constant
from .statistics import Statistics, momentum_of

# Elements up to which float64 costs less than the calls that are saved, as measured.
LARGEST = 1 << 13
LARGEST_IN_ONE_CALL = 1 << 16
LONGEST_ROW = 1 << 10  # of values of which torch's batch norm adds up 64 one by one: squares cancel
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def is_small(input: Tensor, in_one_call: bool = False) -> bool:
    """Whether a dense map is, and torch's batch norm keeps its layout."""
    largest = LARGEST_IN_ONE_CALL if in_one_call else LARGEST
    return 0 < input.numel() <= largest and (input.dim() == 4 or input.is_contiguous())


def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """sum(x) and sum(x**2) of each channel, float64 [C]."""
    values, channels = input.double(), input.shape[1]
    if input.is_contiguous() and 1 < input.numel() // (input.shape[0] * channels) <= LONGEST_ROW:
        zero, one = (constant(channels, value, torch.float64) for value in (0.0, 1.0))
        settings = None, zero, one, None, None, False, 0.0, [False, True, True]
        _, squares, total = _batch_norm_backward(values, values, *settings)
        return total, squares
    others = 0, *range(2, input.dim())
    return values.sum(others), (values * values).sum(others)


def normalize(
    input: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """xhat * weight + bias."""
    vectors = [None if vector is None else vector.double() for vector in (weight, bias)]
    settings: Any = *vectors, statistics.mean, statistics.variance, False, 0.0, eps
    return torch.native_batch_norm(input.double(), *settings)[0].to(input.dtype)


def grad_moments(
    grad_output: Tensor, input: Tensor, statistics: Statistics, eps: float
) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [C]."""
    batch = statistics.mean, statistics.variance, None, None, False, eps, [False, True, True]
    _, products, grads = _batch_norm_backward(grad_output.double(), input.double(), None, *batch)
    return grads, products


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    statistics: Statistics,
    grad_moments: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """(dy - mean(dy) - xhat * mean(dy * xhat)) * rstd * weight."""
    channels, minus_means = input.shape[1], grad_moments * (-1.0 / max(statistics.count, 1.0))
    batch = statistics.mean, statistics.variance
    values = input.double()
    slope, grad_mean = minus_means[channels:], minus_means[:channels]
    rest = torch.native_batch_norm(values, slope, grad_mean, *batch, False, 0.0, eps)[0]
    rest += grad_output
    settings = *batch, None, None, False, eps, [True, False, False]
    weight = None if weight is None else weight.double()
    return _batch_norm_backward(rest, values, weight, *settings)[0].to(input.dtype)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: RunningStatistics,
) -> tuple[Tensor, ...]:
    """Of a process that is alone: the output; and mean and rstd, float64 [C]. Moves the running
    statistics.
    """
    mean, var, num_batches_tracked, _ = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    momentum = 0.0 if mean is None else momentum_of(running)
    vectors = [None if vector is None else vector.double() for vector in (weight, bias, mean, var)]
    settings: Any = *vectors, True, momentum, eps
    output, *statistics = torch.native_batch_norm(input.double(), *settings)
    for buffer, moved in zip((mean, var), vectors[2:], strict=True):
        if buffer is not None and moved is not None:
            buffer.copy_(moved)
    return output.to(input.dtype), *statistics


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean_and_rstd: Sequence[Tensor],
    eps: float,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of input, weight and bias in these dtypes; None for one without."""
    vectors = None if weight is None else weight.double(), None, None, *mean_and_rstd
    wanted = [dtype is not None for dtype in dtypes]
    gradients = _batch_norm_backward(
        grad_output.double(), input.double(), *vectors, True, eps, wanted
    )
    return [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]
