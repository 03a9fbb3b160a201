"""Mean and variance of the global batch, for the steps on a CPU."""

import torch
from torch import Tensor

from .reference import NOISE_OF_VARIANCE

NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings


def are_near(total: Tensor, squares: Tensor, values: float) -> bool:
    """Whether the means of all channels are near 0, by sum(x) and sum(x**2) of so many values."""
    share = (1.0 + NEAR**-2) / values
    return torch.addcmul(squares, total, total, value=-share).min().item() >= 0.0


class Statistics:
    """Of each channel, in float64: mean and variance, from the means of x and of x**2; the count;
    and whether all means are near 0, if that is not known.
    """

    def __init__(
        self, mean: Tensor, squares: Tensor, count: float, is_near: bool | None = None
    ) -> None:
        self.mean, self.count = mean, count
        self.variance = torch.addcmul(squares, mean, mean, value=-1.0)
        self.is_near = are_near(mean, squares, 1.0) if is_near is None else is_near
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
        self._rstd: dict[float, Tensor] = {}

    def shift_and_rest(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What must be taken off values of a dtype first, if anything, and the mean of what is left
        then, float64. So float32 holds a mean that is far from 0.
        """
        if self.is_near:
            return None, self.mean
        shift = self.mean.to(dtype)
        return shift, self.mean - shift

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps), float64."""
        if eps not in self._rstd:
            self._rstd[eps] = (self.variance + eps).rsqrt_()
        return self._rstd[eps]


def statistics_of(moments: Tensor | Statistics) -> Statistics:
    """Those of moments, from where `keep_statistics` has left them, if it has."""
    if isinstance(moments, Statistics):
        return moments
    kept: Statistics | None = vars(moments).get("statistics")
    if kept is not None:
        return kept
    channels, count = moments.shape[0] // 2, moments[-1].item()
    means = moments / max(count, 1.0)
    return Statistics(means[:channels], means[channels:-1], count)


def keep_statistics(moments: Tensor | Statistics) -> Statistics:
    """Those of moments, kept there for the steps of backward: they do not change any more."""
    vars(moments).pop("statistics", None)
    statistics = statistics_of(moments)
    if isinstance(moments, Tensor):
        vars(moments)["statistics"] = statistics
    return statistics
