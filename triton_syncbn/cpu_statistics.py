"""Mean and variance of the global batch, for the steps on a CPU."""

import functools

import torch
from torch import Tensor

from .reference import NOISE_OF_VARIANCE

NEAR = 1.0  # |mean| in deviations up to which float32 loses no more to it than a few roundings


class Statistics:
    """Of each channel, from the moments: mean and variance in float64; the count; and whether all
    means are near 0.
    """

    def __init__(self, moments: Tensor) -> None:
        channels = moments.shape[0] // 2
        self.moments = moments.clone()
        self.count = moments[-1].item()
        per_value = moments / max(self.count, 1.0)
        self.mean, squares = per_value[:channels], per_value[channels:-1]
        self.variance = torch.addcmul(squares, self.mean, self.mean, value=-1.0)
        spare = torch.addcmul(self.variance, self.mean, self.mean, value=-(NEAR**-2))
        self.is_near = spare.min().item() >= 0.0
        if not self.is_near:  # equal values have no variance but what rounding leaves of it
            self.variance.masked_fill_(self.variance < squares * NOISE_OF_VARIANCE, 0.0)
        self._rstd: dict[float, Tensor] = {}

    @functools.cached_property
    def _float32(self) -> tuple[Tensor | None, Tensor, Tensor]:
        high, variance = self.mean.float(), self.variance.float()
        if self.is_near:
            return None, high, variance
        return high, (self.mean - high).float(), variance

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        """What must be taken off the values first, if anything; the mean of what is left then; and
        the variance. So float32 holds a mean that is far from 0.
        """
        return self._float32 if dtype == torch.float32 else (None, self.mean, self.variance)

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps), float64."""
        if eps not in self._rstd:
            self._rstd[eps] = (self.variance + eps).rsqrt_()
        return self._rstd[eps]


def statistics_of(moments: Tensor) -> Statistics:
    """Those of moments, at which they are kept for the other steps of a layer."""
    kept: Statistics | None = vars(moments).get("statistics")
    if kept is None or not torch.equal(kept.moments, moments):  # no version tells of an all_reduce
        kept = vars(moments)["statistics"] = Statistics(moments)
    return kept
