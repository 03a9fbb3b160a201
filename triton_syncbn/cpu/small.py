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
from .sums import batch_norm_backward

# Elements up to which float64 costs less than the calls that are saved, as measured.
LARGEST = 1 << 13
LARGEST_IN_ONE_CALL = 1 << 16
LONGEST_ROW = 1 << 10  # of values of which torch's batch norm adds up 64 one by one: squares cancel


def is_small(shape: torch.Size, is_contiguous: bool, largest: int) -> bool:
    """Whether a dense map is, and torch's batch norm keeps its layout."""
    return 0 < shape.numel() <= largest and (len(shape) == 4 or is_contiguous)


class Small:
    """The way of one geometry."""

    def __init__(self, shape: torch.Size, is_contiguous: bool) -> None:
        samples, channels = shape[:2]
        values = shape.numel() // channels
        self.others = 0, *range(2, len(shape))
        self.in_rows = is_contiguous and 1 < values // samples <= LONGEST_ROW
        with torch.inference_mode(False):
            self.count = torch.full((1,), values, dtype=torch.float64, device="cpu")
        self.zero, self.one = (constant(channels, value, torch.float64) for value in (0.0, 1.0))

    def sums(self, input: Tensor) -> tuple[Tensor, Tensor, bool | None]:
        """sum(x) and sum(x**2); whether means are near, which nobody asks here, is None."""
        values = input.double()
        if not self.in_rows:
            return values.sum(self.others), (values * values).sum(self.others), None
        settings = None, self.zero, self.one, None, None, False, 0.0, [False, True, True]
        _, squares, total = batch_norm_backward(values, values, *settings)
        return total, squares, None

    def normalize(
        self,
        input: Tensor,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """xhat * weight + bias."""
        vectors = [None if vector is None else vector.double() for vector in (weight, bias)]
        settings: Any = *vectors, statistics.mean, statistics.variance, False, 0.0, eps
        return torch.native_batch_norm(input.double(), *settings)[0].to(input.dtype)

    def grad_sums(
        self, grad_output: Tensor, input: Tensor, statistics: Statistics, eps: float
    ) -> tuple[Tensor, Tensor]:
        """sum(dy) and sum(dy * xhat)."""
        batch = statistics.mean, statistics.variance, None, None, False, eps, [False, True, True]
        values, grad = input.double(), grad_output.double()
        _, products, grads = batch_norm_backward(grad, values, None, *batch)
        return grads, products

    def grad_input(
        self,
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
        return batch_norm_backward(rest, values, weight, *settings)[0].to(input.dtype)


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
    gradients = batch_norm_backward(
        grad_output.double(), input.double(), *vectors, True, eps, wanted
    )
    return [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]
