"""A layer of a process that is alone, on a CPU: no sums travel between the steps of a pass.

So they need no moments that others add to; and torch's own batch norm does a pass in one call. In
float64, in which it is exact, that pays for small maps, of which a pass takes as long as its calls
are many.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .cpu_small import is_small
from .cpu_statistics import Statistics
from .operands import RunningStatistics

LARGEST = 1 << 16  # elements up to which torch's batch norm in float64 is faster, as measured
_native_backward = torch.ops.aten.native_batch_norm_backward.default


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: RunningStatistics,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, with the running statistics moved; and what `backward` needs, float64 [2C]."""
    if not is_small(input, LARGEST):
        values = input.numel() // input.shape[1]
        total, squares, is_near = cpu.sums_of(input)
        mean, squares = total / max(values, 1), squares / max(values, 1)
        statistics = vars(mean)["statistics"] = Statistics(mean, squares, values, is_near)
        output = cpu.normalize(input, statistics, weight, bias, eps=eps, running=running)
        return output, (mean, squares)
    mean, var, num_batches_tracked, momentum = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
    vectors = [None if vector is None else vector.double() for vector in (weight, bias, mean, var)]
    settings: Any = *vectors, True, momentum or 0.0, eps
    output, *mean_and_rstd = torch.native_batch_norm(input.double(), *settings)
    for buffer, moved in zip((mean, var), vectors[2:], strict=True):
        if buffer is not None and moved is not None:
            buffer.copy_(moved)
    return output.to(input.dtype), tuple(mean_and_rstd)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias in their dtypes; None for one without a dtype."""
    wanted = [dtype is not None for dtype in dtypes]
    if not is_small(input, LARGEST):
        statistics = vars(saved[0]).get("statistics")  # a hook may have saved a copy, without
        if statistics is None:
            statistics = Statistics(saved[0], saved[1], input.numel() // input.shape[1])
        sums, *gradients = cpu.grad_moments(
            grad_output, input, statistics, dtypes[1], dtypes[2], eps
        )
        of_input = None
        if wanted[0]:
            of_input = cpu.grad_input(grad_output, input, statistics, sums, weight, eps)
        of_weight, of_bias = (gradients[i] if wanted[i + 1] else None for i in range(2))
        return of_input, of_weight, of_bias
    settings = weight if weight is None else weight.double(), None, None, *saved, True, eps
    gradients = _native_backward(grad_output.double(), input.double(), *settings, wanted)
    return tuple(
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
