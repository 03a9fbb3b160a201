"""Small maps on a CPU, in float64, in as few calls as there can be: they take the time of a step.

Torch's batch norm in float64 is exact, takes a map whole, and keeps its layout if that is
contiguous, or of four dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from .cpu_memory import constant
from .cpu_statistics import Statistics

LARGEST = 1 << 13  # elements up to which float64 costs nothing, as measured
LONGEST_ROW = 1 << 10  # of values of which torch's batch norm adds up 64 one by one: squares cancel
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


def is_small(input: Tensor, largest: int | None = None) -> bool:
    """Whether a dense map is, and torch's batch norm keeps its layout."""
    if not 0 < input.numel() <= (largest or LARGEST):
        return False
    return input.dim() == 4 or input.is_contiguous()


def sums(grad_output: Tensor | None, input: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (x - mean)) of each channel, float64 [C]; without a dy it is x, and
    without a mean it is 0.
    """
    values = input.double()
    grad = values if grad_output is None else grad_output.double()
    channels, row = input.shape[1], input.numel() // (input.shape[0] * input.shape[1])
    if 1 < row <= LONGEST_ROW and input.is_contiguous():
        one = constant(channels, 1.0, torch.float64)
        mean = constant(channels, 0.0, torch.float64) if mean is None else mean
        settings = one, mean, one, None, None, False, 0.0, [False, True, True]
        _, second, first = _batch_norm_backward(grad, values, *settings)
        return first, second
    others = 0, *range(2, input.dim())
    first, second = grad.sum(others), (grad * values).sum(others)
    return first, second if mean is None else second.addcmul_(first, mean, value=-1.0)


def batch_norm(
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_output: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """xhat * weight + bias, and + dy * scale if there is a dy; vectors are [C]."""
    vectors = (None if vector is None else vector.double() for vector in (weight, bias))
    settings: Any = *vectors, statistics.mean, statistics.variance, False, 0.0, eps
    output = torch.native_batch_norm(input.double(), *settings)[0]
    if grad_output is not None and scale is not None:
        output.addcmul_(grad_output.double(), scale.view(-1, *[1] * (input.dim() - 2)))
    return output.to(input.dtype)
