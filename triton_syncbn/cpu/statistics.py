"""Mean and variance of the global batch, for the steps on a CPU."""

from typing import Any

import torch
from torch import Tensor

from ..operands import RunningStatistics
from ..reference import NOISE_OF_VARIANCE

NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings


def are_near(total: Tensor, squares: Tensor, values: float) -> bool:
    """Whether the means of all channels are near 0, by sum(x) and sum(x**2) of so many values."""
    share = (1.0 + NEAR**-2) / values
    return torch.addcmul(squares, total, total, value=-share).min().item() >= 0.0


class Statistics:
    """Of each channel, from the moments: mean and variance in float64; the count; and whether all
    means are near 0.

    It is enough if those of this rank's values are, which `moments` has found out: nothing cancels
    there, as a mean of all ranks that is far from these values is as large as their results.
    """

    def __init__(self, moments: Tensor) -> None:
        channels = moments.shape[0] // 2
        self.count = moments[-1].item()
        per_value = moments / max(self.count, 1.0)
        self.mean, squares = per_value[:channels], per_value[channels:-1]
        self.variance = torch.addcmul(squares, self.mean, self.mean, value=-1.0)
        is_near = vars(moments).get("is_near")
        self.is_near = are_near(self.mean, squares, 1.0) if is_near is None else is_near
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
        self._rstd: dict[float, Tensor] = {}
        self._scale: tuple[Any, ...] = ()
        self._shifts: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def shift_and_rest(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What must be taken off values of a dtype first, if anything, and the mean of what is left
        then, float64. So float32 holds a mean that is far from 0.
        """
        if self.is_near:
            return None, self.mean
        if dtype not in self._shifts:
            shift = self.mean.to(dtype)
            self._shifts[dtype] = shift, self.mean - shift
        return self._shifts[dtype]

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps), float64."""
        if eps not in self._rstd:
            self._rstd[eps] = (self.variance + eps).rsqrt_()
        return self._rstd[eps]

    def scale(self, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """weight / sqrt(variance + eps), float64, and rounded to a dtype."""
        version = 0 if weight is None or weight.is_inference() else weight._version
        key = version, eps, dtype
        if self._scale[:1] != (key,) or self._scale[1] is not weight:
            scale = self.rstd(eps)
            scale = scale if weight is None else scale * weight
            self._scale = key, weight, scale, scale.to(dtype)
        return self._scale[2:]

    def move(self, running: RunningStatistics) -> None:
        """Move running statistics towards these, and count the batch, unless it is empty."""
        mean, var, num_batches_tracked, _ = running
        if self.count == 0.0:
            return
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if mean is not None and var is not None:
            momentum = momentum_of(running)
            unbiased = momentum * self.count / max(self.count - 1.0, 1.0)
            kept = 1.0 - momentum  # added in float64, which is rounded once
            torch.add(self.mean * momentum, mean, alpha=kept, out=mean)
            torch.add(self.variance * unbiased, var, alpha=kept, out=var)


def momentum_of(running: RunningStatistics) -> float:
    """The share of a batch that has been counted."""
    if running.momentum is not None:
        return running.momentum
    assert running.num_batches_tracked is not None
    return 1.0 / max(running.num_batches_tracked.item(), 1.0)


def keep_statistics(moments: Tensor) -> Statistics:
    """Those of moments, kept there for the steps of backward: they do not change any more."""
    statistics = vars(moments)["statistics"] = Statistics(moments)
    return statistics


def statistics_of(moments: Tensor) -> Statistics:
    """Those of moments, from where they are kept; a hook of autograd may have left a copy."""
    return vars(moments).get("statistics") or Statistics(moments)
