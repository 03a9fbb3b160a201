"""A synchronized batch norm that sends what torch.nn.SyncBatchNorm sends, for machines where that
one does not run.

Forward gathers mean, 1/std and count of every rank, 2C + 1 numbers each; backward all-reduces 2C.
What a rank computes by itself are the operators of triton_syncbn, so the two differ in
communication, in what follows from it, and in nothing else.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from triton_syncbn import ops


def merge(gathered: Tensor, eps: float) -> Tensor:
    """Moments of the global batch, float64 [2C + 1], from mean, 1/std and count of every rank,
    [ranks, 2C + 1].
    """
    channels = gathered.shape[1] // 2
    means, rstds, counts = gathered.double().split((channels, channels, 1), dim=1)
    squares = rstds.pow(-2) - eps + means * means
    return torch.cat([(means * counts).sum(0), (squares * counts).sum(0), counts.sum(0)])


class _GatherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, layer: Any) -> Tensor:
        total, squares, count = ops.moments(input).split((input.shape[1], input.shape[1], 1))
        mean = total / count
        rstd = (squares / count - mean * mean + layer.eps).rsqrt()
        ctx.dtype_sent = torch.promote_types(input.dtype, torch.float32)
        mine = torch.cat([mean, rstd, count]).to(ctx.dtype_sent)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        moments = merge(torch.stack(gathered), layer.eps)
        ctx.save_for_backward(input, weight, moments)
        ctx.eps = layer.eps
        buffers = dict(layer.named_buffers())
        return ops.normalize(
            input, moments, weight, bias, **buffers, momentum=layer.momentum, eps=layer.eps
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, moments = ctx.saved_tensors
        sums, grad_weight, grad_bias = ops.grad_moments(
            grad_output, input, moments, weight.dtype, weight.dtype, ctx.eps
        )
        sent = sums.to(ctx.dtype_sent)
        dist.all_reduce(sent)
        grad_input = ops.grad_input(grad_output, input, moments, sent.double(), weight, ctx.eps)
        return grad_input, grad_weight, grad_bias, None


class GatherSyncBN(_BatchNorm):
    """The layer; it runs in training on all ranks, each with samples."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *spatial) with the statistics of all ranks."""
        return _GatherFunction.apply(input, self.weight, self.bias, self)
