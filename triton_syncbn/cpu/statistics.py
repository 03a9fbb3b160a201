"""Mean and variance of the global batch, for the steps on a CPU."""

import math
from typing import Any

import torch
from torch import Tensor

from ..operands import RunningStatistics
from ..reference import NOISE_OF_VARIANCE

NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings


def are_near(total: Tensor, squares: Tensor, values: float, near: float = NEAR) -> bool:
    """Whether the means of all channels are within `near` deviations of 0, by sum(x) and sum(x**2)
    of so many values. Not where a sum of squares has overflowed.
    """
    share = (1.0 + near**-2) / values
    least, most = torch.aminmax(torch.addcmul(squares, total, total, value=-share))
    return least.item() >= 0.0 and most.item() < math.inf


class Statistics:
    """Of each channel, from the moments: mean and variance in float64; the count; and whether all
    means are near 0.

    It is enough if those of this rank's values are, which `moments` has found out: nothing cancels
    there, as a mean of all ranks that is far from these values is as large as their results.
    """

    def __init__(self, moments: Tensor) -> None:
        channels = moments.numel() // 2
        self.count = moments[2 * channels :].item()
        per_value = moments / max(self.count, 1.0)
        self.mean, squares = per_value[:channels], per_value[channels:-1]
        self.variance = torch.addcmul(squares, self.mean, self.mean, value=-1.0)
        is_near = vars(moments).get("is_near")
        self.is_near = are_near(self.mean, squares, 1.0) if is_near is None else is_near
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
        self._kept: dict[Any, Any] = {}

    def shift_and_rest(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What must be taken off values of a dtype first, if anything, and the mean of what is left
        then, float64. So float32 holds a mean that is far from 0.
        """
        if self.is_near:
            return None, self.mean
        if dtype not in self._kept:
            shift = self.mean.to(dtype)
            self._kept[dtype] = shift, self.mean - shift
        return self._kept[dtype]

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps), float64."""
        if eps not in self._kept:
            self._kept[eps] = (self.variance + eps).rsqrt_()
        return self._kept[eps]

    def scale_and_share(
        self, weight: Tensor | None, eps: float, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """weight / sqrt(variance + eps), rounded to a dtype; and, float64, what of a sum of all
        values a mean takes off the gradient of one: minus that over the count.
        """
        version = None if weight is None or weight.is_inference() else weight._version
        made_of = eps, dtype, version
        kept = self._kept.get("scale")
        if kept is None or kept[0] is not weight or kept[1] != made_of:
            scale = self.rstd(eps)
            scale = scale if weight is None else scale * weight
            share = scale * (-1.0 / max(self.count, 1.0))
            kept = self._kept["scale"] = weight, made_of, (scale.to(dtype), share)
        return kept[2]

    def factor_and_shift(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Those of which xhat * weight + bias is x * factor + shift, or that of what is left of x
        by `shift_and_rest`.
        """
        rest = self.shift_and_rest(dtype)[1]
        factor = self.scale_and_share(weight, eps, dtype)[0]
        # Of the rounded factor, so that its error meets deviations from the mean alone
        shift = factor * -rest if bias is None else torch.addcmul(bias, factor, rest, value=-1.0)
        return factor, shift.to(dtype)

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
            mean.copy_((self.mean * momentum).add_(mean, alpha=kept))
            var.copy_((self.variance * unbiased).add_(var, alpha=kept))


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
