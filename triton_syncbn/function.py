"""The autograd Function: moments, all_reduce, normalize; and its mirror in backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, differentiable, ops
from .activations import ACTIVATIONS
from .checkpointing import keep_sums, take_sums, this_thread
from .communication import all_reduce, all_reduce_now
from .cpu import small
from .operands import BlockOperands, RunningStatistics, by_keyword


class Setting(NamedTuple):
    """What a layer is told beside tensors."""

    eps: float
    group: Any  # None: this process is alone
    layer_name: str  # in errors
    frozen: bool  # normalizes with the running statistics, which stay
    activation: str | None
    activation_slope: float
    is_of_layer_alone: bool  # neither frozen nor with an activation
    steps: ops.Steps | None = None  # those to take in forward, if not the operators


class SyncBatchNormFunction(torch.autograd.Function):
    """activation(batch normalization + residual) with the statistics of all ranks of a group.

    Each pass makes one `dist.all_reduce`, or none where there is no group or the layer is frozen.
    The tensor on the wire is float64 and its size depends on the number of channels alone: [2C + 1]
    in forward, [2C] in backward. Gradients of weight and bias stay those of this rank.

    Nothing that has the size of the input is saved but the input and, for an activation of a sum
    with a residual, what tells its derivative: gates of one bit or byte where that has two values,
    which move the fewest bytes, else the residual.
    """

    @classmethod
    def run(cls, *arguments: Any) -> Tensor:
        """As `apply`, which first looks for arguments that torch.func has left behind."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: RunningStatistics,
        setting: Setting,
        *buffers: Tensor | None,
    ) -> Tensor:
        """Normalize (N, C, *spatial), unchecked. buffers: those of `running`, for torch.jit.trace,
        which wants all tensors; else none, as each takes autograd a microsecond.
        """
        steps = ops.OPERATORS if setting.steps is None else setting.steps
        dense = input if steps is ops.OPERATORS else ops.dense(input)
        ctx.setting, ctx.names = setting, ()
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.in_one_call = (
            setting.group is None
            and setting.is_of_layer_alone
            and residual is None
            and steps.moments is cpu.moments
            and small.is_small(dense.shape, dense.is_contiguous(), small.LARGEST_IN_ONE_CALL)
        )
        if ctx.in_one_call:
            settings = weight, bias, setting.eps, ops.unless_again(running)
            output, *mean_and_rstd = small.forward(dense, *settings)
            ctx.save_for_backward(input, weight, None, *mean_and_rstd)
            return output
        moments = None if setting.frozen else _moments_of_all_ranks(steps, dense, setting)
        if residual is None and running.mean is not None and setting.is_of_layer_alone:
            ctx.save_for_backward(input, weight, moments)
            if steps is not ops.OPERATORS:  # which do it themselves
                running = ops.unless_again(running)
            return steps.normalize(dense, moments, weight, bias, eps=setting.eps, running=running)
        operands = dense, moments, weight, bias, residual
        output, saved = _normalize_block(steps, *operands, running, setting)
        ctx.save_for_backward(input, weight, moments, *saved.values())
        ctx.names = tuple(saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight, bias and residual."""
        input, weight, moments, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            if ctx.in_one_call:
                moments, others = _moments_again(input), []
            gradients = _differentiable_gradients(ctx, grad_output, input, weight, moments, others)
            return *gradients, *[None] * (len(needed) - 4)
        setting: Setting = ctx.setting
        needs_input, needs_weight, needs_bias, needs_residual = needed[:4]
        weight_dtype = weight.dtype if needs_weight else None
        bias_dtype = ctx.bias_dtype if needs_bias else None
        grad_residual = grad_output if needs_residual else None
        steps = ops.steps_for(grad_output, input, weight, *others)
        if steps is not ops.OPERATORS:
            input = ops.dense(input)
            grad_output = ops.laid_out_like(grad_output, input)
        if ctx.in_one_call and steps is not ops.OPERATORS:
            dtypes = input.dtype if needs_input else None, weight_dtype, bias_dtype
            settings = weight, others, setting.eps, dtypes
            return *small.backward(grad_output, input, *settings), *[None] * (len(needed) - 3)
        if ctx.in_one_call:
            moments, others = _moments_again(input), []
        grad_input = None
        if others:
            saved = dict(zip(ctx.names, others, strict=True))
            grad_input, grad_weight, grad_bias, made = _gradients_of_block(
                *(steps, grad_output, input, weight, moments, setting, saved),
                *((weight_dtype, bias_dtype), needed),
            )
            grad_residual = grad_residual if made is None else made
        else:
            grad_moments, grad_weight, grad_bias = steps.grad_moments(
                grad_output, input, moments, weight_dtype, bias_dtype, setting.eps
            )
            if needs_input:
                if setting.group is not None:
                    reduce = all_reduce if steps is ops.OPERATORS else all_reduce_now
                    grad_moments = reduce(
                        grad_moments, setting.group, setting.layer_name, "backward"
                    )
                grad_input = steps.grad_input(
                    grad_output, input, moments, grad_moments, weight, setting.eps
                )
        return (
            grad_input if needs_input else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_residual,
            *[None] * (len(needed) - 4),
        )


def _normalize_block(
    steps: ops.Steps,
    input: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStatistics,
    setting: Setting,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and what backward needs beside what it needs of a layer alone."""
    block: dict[str, Any] = {}
    saved: dict[str, Tensor | None] = {}
    if setting.frozen:
        # else the buffers are not saved: they change before backward if the layer runs twice
        saved = {"running_mean": running.mean, "running_var": running.var}
    if residual is not None:
        block["residual"] = residual
    if setting.activation is not None:
        block.update(activation=setting.activation, activation_slope=setting.activation_slope)
        saved["bias"] = bias
        if residual is not None and ACTIVATIONS[setting.activation].gated:
            block["keeps_gates"] = True
        elif residual is not None:
            saved["residual"] = residual
    output, gates = steps.normalize_block(
        input, moments, weight, bias, **by_keyword(running), eps=setting.eps, **block
    )
    if "keeps_gates" in block:
        saved["gates"] = gates
    return output, saved


def _differentiable_gradients(
    ctx: Any,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    moments: Tensor | None,
    others: list[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of input, weight, bias and residual, by operators that torch can differentiate."""
    setting: Setting = ctx.setting
    saved: dict[str, Any] = dict(zip(ctx.names, others, strict=True))
    running = RunningStatistics(saved.pop("running_mean", None), saved.pop("running_var", None))
    block = BlockOperands(setting.activation, setting.activation_slope, running=running, **saved)
    gradients = differentiable.gradients(grad_output, input, weight, moments, setting, block)
    dtypes = input.dtype, None if weight is None else weight.dtype, ctx.bias_dtype, input.dtype
    return [
        gradient.to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, dtypes, ctx.needs_input_grad[:4], strict=True)
    ]


def _gradients_of_block(
    steps: ops.Steps,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    moments: Tensor | None,
    setting: Setting,
    block: dict[str, Any],
    dtypes: tuple[Any, Any],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias, of an activation or of a frozen layer; and that of the
    residual where it is another than that of the output.
    """
    needs_input, needs_weight, needs_bias, needs_residual = needs[:4]
    grad_moments = grad_weight = grad_bias = grad_input = None
    makes_residual = needs_residual and setting.activation is not None
    if setting.activation is not None:
        block.update(activation=setting.activation, activation_slope=setting.activation_slope)
    if not setting.frozen or needs_weight or needs_bias:
        grad_moments, grad_weight, grad_bias = steps.grad_moments_block(
            *(grad_output, input, moments, *dtypes, setting.eps), weight=weight, **block
        )
    grad_residual = None
    if needs_input or makes_residual:
        if setting.group is not None and needs_input and grad_moments is not None:
            grad_moments = all_reduce(grad_moments, setting.group, setting.layer_name, "backward")
        if setting.frozen:
            grad_moments = None
        grad_input, made = steps.grad_input_block(
            *(grad_output, input, moments, grad_moments, weight, setting.eps),
            **block,
            makes_residual=makes_residual,
        )
        if makes_residual:
            grad_residual = made
    return grad_input, grad_weight, grad_bias, grad_residual


def _moments_again(input: Tensor) -> Tensor:
    """Those that a forward in one call did without, for steps that want them."""
    with torch.no_grad():
        return ops.moments(input)


def _moments_of_all_ranks(steps: ops.Steps, input: Tensor, setting: Setting) -> Tensor:
    group, name = setting.group, setting.layer_name
    local_moments = steps.moments if setting.is_of_layer_alone else steps.moments_block
    if group is None:
        return local_moments(input)
    if steps is ops.OPERATORS and torch.compiler.is_compiling():
        return all_reduce(local_moments(input), group, name, "forward")
    reduce = all_reduce if steps is ops.OPERATORS else all_reduce_now
    if not this_thread.regions:
        return reduce(local_moments(input), group, name, "forward")
    moments = take_sums(name)
    if moments is None:
        moments = reduce(local_moments(input), group, name, "forward")
    keep_sums(moments, name)
    return moments
