"""Batch normalization and its gradients as plain functions in float64, which torch can
differentiate again, in either mode, and transform (torch.func).
"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .communication import all_reduce
from .operands import BlockOperands, RunningStatistics


class _DifferentiableAllReduce(torch.autograd.Function):
    """Sum over the ranks, whose derivative is the sum of the derivatives over the ranks."""

    @staticmethod
    def forward(sums: Tensor, group: Any, layer_name: str, pass_name: str) -> Tensor:
        copy = sums.clone(memory_format=torch.contiguous_format)
        return all_reduce(copy, group, layer_name, pass_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.layer_name, ctx.pass_name = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sums = _DifferentiableAllReduce.apply(grad, ctx.group, ctx.layer_name, "backward")
        return sums, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return _DifferentiableAllReduce.apply(tangent, ctx.group, ctx.layer_name, ctx.pass_name)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int | None]:
        return _DifferentiableAllReduce.apply(*arguments), in_dims[0]


class _KnownSums(torch.autograd.Function):
    """Sums over the ranks that are known already; only their derivative is communicated."""

    @staticmethod
    def forward(sums: Tensor, known: Tensor, group: Any, layer_name: str) -> Tensor:
        return known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, ctx.layer_name = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.group is not None:
            grad = _DifferentiableAllReduce.apply(grad, ctx.group, ctx.layer_name, "backward")
        return grad, None, None, None


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics,
    eps: float,
    group: Any,
    layer_name: str,
) -> Tensor:
    """What `SyncBatchNormFunction` computes of a layer alone; one all_reduce of [2C + 1] for the
    value and one for each derivative.
    """
    others, per_channel = _shapes(input)
    value = input.double()
    count = value.new_full((1,), input.numel() // input.shape[1])
    moments = torch.cat([value.sum(others), (value * value).sum(others), count])
    if group is not None:
        moments = _DifferentiableAllReduce.apply(moments, group, layer_name, "forward")
    mean, variance, count = reference.mean_and_variance(moments)
    _update_buffers(mean, variance, count, running)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    output = (value - mean.view(per_channel)) * scale.view(per_channel)
    if bias is not None:
        output = output + bias.double().view(per_channel)
    return output.to(input.dtype)


def _update_buffers(
    mean: Tensor, variance: Tensor, count: Tensor, running: RunningStatistics
) -> None:
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return  # a checkpointed forward runs again, see ops.py
    batch = (mean.detach(), variance.detach(), count.detach())
    try:
        reference.update_running_statistics(*batch, running)
    except RuntimeError as error:
        raise RuntimeError(
            "running_mean, running_var, num_batches_tracked: expected None (no running statistics) "
            "or buffers that torch.func lets a function change: its own arguments, under vmap with "
            f"a dimension to map over; {error}"
        ) from error


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    moments: Tensor | None,
    setting: Any,
    block: BlockOperands,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight, bias and residual as a function that torch can differentiate
    again; one all_reduce, of [2, C]. setting: of SyncBatchNormFunction.
    """
    others, per_channel = _shapes(input)
    value, grad = input.double(), grad_output.double()
    group = setting.group, setting.layer_name
    if moments is None:
        mean, variance, count = reference.statistics_of_layer(None, block.running)
    else:
        count = moments[-1].clamp(min=1.0)
        sums = torch.stack([value.sum(others), (value * value).sum(others)])
        sums = _KnownSums.apply(sums, moments[:-1].view(2, -1), *group)
        mean, mean_square = (sums / count).unbind()
        variance = (mean_square - mean * mean).clamp(min=0.0)
    rstd = (variance + setting.eps).rsqrt()
    scale = (rstd if weight is None else rstd * weight.double()).view(per_channel)
    normalized = (value - mean.view(per_channel)) * rstd.view(per_channel)
    if block.activation is not None:
        grad = reference.gradient_of_z(
            grad,
            lambda: _before_activation(normalized, weight, block.bias, block.residual),
            block.gates,
            input,
            block.activation,
            block.activation_slope,
        )
    grad_weight, grad_bias = (grad * normalized).sum(others), grad.sum(others)
    if moments is None:
        return grad * scale, grad_weight, grad_bias, grad
    sums = torch.stack([grad_bias, grad_weight])
    if setting.group is not None:
        sums = _DifferentiableAllReduce.apply(sums, *group, "backward")
    grad_mean, product_mean = (sums / count).view(2, *per_channel)
    grad_input = (grad - grad_mean - normalized * product_mean) * scale
    return grad_input, grad_weight, grad_bias, grad


def _before_activation(
    normalized: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    per_channel = _shapes(normalized)[1]
    z = normalized if weight is None else normalized * weight.double().view(per_channel)
    if bias is not None:
        z = z + bias.double().view(per_channel)
    return z if residual is None else z + residual.double()


def _shapes(input: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """All dimensions but that of the channels, and the shape that spreads one value per channel."""
    return [0, *range(2, input.dim())], (-1, *[1] * (input.dim() - 2))
