"""The autograd Function: moments, all_reduce, normalize; and its mirror in backward."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .communication import all_reduce


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch normalization with the statistics of all ranks of a group.

    Each pass makes one `dist.all_reduce`, or none where there is no group.
    The tensor on the wire is float64 and its size depends on the number of channels alone: [2C + 1]
    in forward, [2C] in backward. Gradients of weight and bias stay those of this rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        group: Any,
        layer_name: str,
    ) -> Tensor:
        """Normalize (N, C, *spatial), unchecked; `layer_name` stands in errors."""
        moments = ops.moments(input)
        if group is not None:
            all_reduce(moments, group, layer_name, "forward")
        # The running buffers are not saved: they change before backward if the layer runs twice.
        ctx.save_for_backward(input, weight, moments)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps = eps
        ctx.group = group
        ctx.layer_name = layer_name
        return ops.normalize(
            input,
            moments,
            weight,
            bias,
            running_mean=running_mean,
            running_var=running_var,
            num_batches_tracked=num_batches_tracked,
            momentum=momentum,
            eps=eps,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        input, weight, moments = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _differentiable_gradients(
                grad_output, input, weight, moments[-1], ctx.eps, ctx.group, ctx.layer_name
            )
            dtypes = (input.dtype, None if weight is None else weight.dtype, ctx.bias_dtype)
            needed = (needs_input, needs_weight, needs_bias)
            cast = [
                g.to(d) if n else None for g, d, n in zip(gradients, dtypes, needed, strict=True)
            ]
            return (*cast, *[None] * 7)
        grad_moments, grad_weight, grad_bias = ops.grad_moments(
            grad_output,
            input,
            moments,
            weight.dtype if needs_weight else None,
            ctx.bias_dtype if needs_bias else None,
            ctx.eps,
        )
        grad_input = None
        if needs_input:
            if ctx.group is not None:
                all_reduce(grad_moments, ctx.group, ctx.layer_name, "backward")
            grad_input = ops.grad_input(grad_output, input, moments, grad_moments, weight, ctx.eps)
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *[None] * 7,
        )


class _DifferentiableAllReduce(torch.autograd.Function):
    """Sum over the ranks, whose gradient is the sum of the gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: Any, layer_name: str) -> Tensor:
        ctx.group = group
        ctx.layer_name = layer_name
        total = sums.clone()
        all_reduce(total, group, layer_name, "backward")
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (
            _DifferentiableAllReduce.apply(grad.contiguous(), ctx.group, ctx.layer_name),
            None,
            None,
        )


def _differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    count: Tensor,
    eps: float,
    group: Any,
    layer_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias as a function that torch can differentiate again.

    Plain torch in float64, for gradient penalties and the like; one all_reduce, of [4, C].
    """
    others = [0, *range(2, input.dim())]
    per_channel = (-1, *[1] * (input.dim() - 2))
    value, grad = input.double(), grad_output.double()
    sums = torch.stack(
        [
            value.sum(others),
            (value * value).sum(others),
            grad.sum(others),
            (grad * value).sum(others),
        ]
    )
    if group is not None:
        sums = _DifferentiableAllReduce.apply(sums, group, layer_name)
    mean, mean_square, grad_mean, product_mean = (sums / count.clamp(min=1.0)).unbind()
    rstd = ((mean_square - mean * mean).clamp(min=0.0) + eps).rsqrt()
    projection = (product_mean - mean * grad_mean) * rstd
    scale = rstd if weight is None else rstd * weight.double()
    normalized = (value - mean.view(per_channel)) * rstd.view(per_channel)
    grad_input = grad - grad_mean.view(per_channel) - normalized * projection.view(per_channel)
    return grad_input * scale.view(per_channel), (grad * normalized).sum(others), grad.sum(others)
