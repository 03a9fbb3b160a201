"""The autograd Function: moments, all_reduce, normalize; and its mirror in backward."""

from typing import Any

import torch
from torch import Tensor

from . import differentiable, ops
from .checkpointing import keep_sums, take_sums, this_thread
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
        if group is None:
            moments = ops.moments(input)
        else:
            moments = _moments_of_all_ranks(input, group, layer_name)
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
            gradients = differentiable.gradients(
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
                grad_moments = all_reduce(grad_moments, ctx.group, ctx.layer_name, "backward")
            grad_input = ops.grad_input(grad_output, input, moments, grad_moments, weight, ctx.eps)
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *[None] * 7,
        )


def _moments_of_all_ranks(input: Tensor, group: Any, layer_name: str) -> Tensor:
    if torch.compiler.is_compiling() or not this_thread.regions:
        return all_reduce(ops.moments(input), group, layer_name, "forward")
    moments = take_sums(layer_name)
    if moments is None:
        moments = all_reduce(ops.moments(input), group, layer_name, "forward")
    keep_sums(moments, layer_name)
    return moments
