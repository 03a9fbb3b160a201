"""Synchronized batch norms as they are often written by hand, and wrong."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class _Average(torch.autograd.Function):
    """The mean over the ranks of a group; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Average.apply(grad, ctx.group), None


class _Averaging(nn.BatchNorm2d):
    """Normalizes by what `statistics` makes of this rank's samples and the averages over ranks."""

    process_group: Any

    def statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalize by, [C] each."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W), in training; in eval mode as any batch norm."""
        if not self.training:
            return super().forward(input)
        mean, variance = self.statistics(input)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance, self.momentum)  # type: ignore[union-attr, arg-type]
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return input * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


class AveragedVariances(_Averaging):
    """Takes the mean of the ranks' variances for that of all: the spread of their means is lost."""

    def statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The averages of both."""
        variance, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        return _Average.apply(torch.stack([mean, variance]), self.process_group).unbind()


class EquallyWeightedRanks(_Averaging):
    """Averages the means of x and of its square over ranks, as if all had equally many samples."""

    def statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Right where ranks have equally many."""
        means = torch.stack([input.mean((0, 2, 3)), input.square().mean((0, 2, 3))])
        mean, mean_of_squares = _Average.apply(means, self.process_group)
        return mean, F.relu(mean_of_squares - mean.square())
