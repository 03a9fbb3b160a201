"""A synchronized batch norm as people write it by hand for machines where torch's does not run:
means of x and of its square go through an all_reduce that autograd knows, the rest is left to it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


class HandwrittenSyncBN(_BatchNorm):
    """The layer; it runs in training on all ranks, with as many values on each."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *spatial) with the statistics of all ranks, in float32 or wider."""
        value = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [0, *range(2, input.dim())]
        means = torch.cat([value.mean(others), (value * value).mean(others)])
        mean, mean_of_squares = (_AllReduce.apply(means) / dist.get_world_size()).chunk(2)
        variance = mean_of_squares - mean * mean
        with torch.no_grad():
            count = dist.get_world_size() * input.numel() / input.shape[1]
            unbiased = variance * (count / (count - 1))
            for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                running += self.momentum * (batch - running)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        per_channel = (-1, *[1] * (input.dim() - 2))
        return (value * scale.view(per_channel) + shift.view(per_channel)).to(input.dtype)
