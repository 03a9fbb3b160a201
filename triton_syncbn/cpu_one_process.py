"""A layer of a process that is alone, on a CPU: where no sums travel between the steps, torch's own
batch norm does those of a pass in one call. In float64, in which it is exact, that pays for small
maps, of which a pass takes as long as its calls are many.
"""

import torch
from torch import Tensor

from .operands import RunningStatistics

LARGEST = 1 << 16  # elements up to which float64 is faster than several calls, as measured
_backward = torch.ops.aten.native_batch_norm_backward.default


def takes(input: Tensor) -> bool:
    """Whether a dense map is small enough, and of a layout that torch's batch norm keeps."""
    return 0 < input.numel() <= LARGEST and (input.dim() == 4 or input.is_contiguous())


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: RunningStatistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, with the running statistics moved; mean and 1 / sqrt(variance + eps), float64."""
    mean, var, num_batches_tracked, momentum = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / max(num_batches_tracked.item(), 1.0)
    wide = [None if vector is None else vector.double() for vector in (weight, bias, mean, var)]
    output, *statistics = torch.native_batch_norm(input.double(), *wide, True, momentum or 0.0, eps)
    for narrow, moved in zip((mean, var), wide[2:], strict=True):
        if narrow is not moved and narrow is not None:
            narrow.copy_(moved)
    return output.to(input.dtype), *statistics


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dtypes: tuple[torch.dtype | None, ...],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Those of input, weight and bias in their dtypes; None for one without a dtype."""
    wide = None if weight is None else weight.double()
    settings = wide, None, None, mean, rstd, True, eps, [dtype is not None for dtype in dtypes]
    gradients = _backward(grad_output.double(), input.double(), *settings)
    return tuple(
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
