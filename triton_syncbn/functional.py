"""The functional form, and the border: what a user passes is checked here, before any
communication.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import differentiable, groups, ops
from .activations import ACTIVATIONS
from .function import Setting, SyncBatchNormFunction
from .operands import RunningStatistics

_PLAIN_TYPES = frozenset({Tensor, Parameter})
_HAS_DISTRIBUTED = dist.is_available()
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_slope: float = 0.01,
    layer_name: str = "",
) -> Tensor:
    """Batch normalization (Ioffe and Szegedy 2015) with the mean and variance of the samples of all
    ranks.

    The signature is that of `torch.nn.functional.batch_norm`. All ranks of the group must make the
    call, in the same order; any of them may bring no samples. In training there is one `all_reduce`
    of 2C + 1 float64 numbers in forward and one of 2C in backward (none there if the input needs no
    gradient); a process that is alone, or is not training, communicates nothing. Gradients of
    weight and bias are those of this rank's samples; DistributedDataParallel or FSDP reduce them.

    Activation checkpointing computes a forward again in backward: that one moves no buffer, and
    with `checkpoint_contexts` it sends nothing. Under torch.func, forward-mode AD and, of a process
    that is alone, torch.export, the same is computed by operators of torch.

    Args:
        input: (N, C, *spatial) with any number of spatial dimensions, float16, bfloat16, float32 or
            float64. Contiguous and channels-last memory are read as they are, other strides
            through a copy.
        running_mean, running_var: (C,), any of these dtypes, or both None. Updated in place in
            training, by the mean and the unbiased variance of the global batch; used as the
            statistics otherwise.
        weight, bias: (C,), any of these dtypes, or None.
        training: whether to normalize with the batch. Without running statistics the batch is used
            in any case, and if not training, this rank's batch alone.
        momentum: share of the new batch in the running statistics; None for the average over all
            batches so far, which needs `num_batches_tracked`.
        eps: added to the variance.
        num_batches_tracked: one number, of any dtype, incremented in training, on the device; an
            empty global batch does not count.
        process_group: the ranks to synchronize: a ProcessGroup, such as `sync_group` returns, a
            DeviceMesh of one dimension, or None for all of them. Looked at in training only.
        residual: added to the normalized input; shape of the input, any of these dtypes, or None.
        activation: of the sum: relu, relu6, leaky_relu, elu (alpha 1), silu, gelu (not its
            approximation) or hardswish; or None.
        activation_slope: of leaky_relu, where its argument is not positive.
        layer_name: the name of the layer in errors of its communication.

    Returns:
        Shape and dtype of the input, and its memory layout where that was dense.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or not on the input's device;
            or a training batch of a process that is alone has one value per channel. Raised before
            any communication.
        RuntimeError: the communication failed, as a rank died or did not come in time; or
            torch.export of training with other ranks; or torch.func with buffers that it lets
            nobody change, as with torch's own batch norm.
    """
    _check_tensors(input, running_mean, running_var, weight, bias)
    group = _group_to_synchronize(process_group) if training else None
    if group is not None and not (input.is_cuda or input.is_cpu or torch.compiler.is_compiling()):
        # On other devices torch may send nothing, and say nothing.
        groups.check_served(input.device, group)
    if num_batches_tracked is None:
        if momentum is None and training and running_mean is not None:
            raise ValueError(
                "num_batches_tracked: expected a tensor, as momentum is None; got None"
            )
    elif not (
        type(num_batches_tracked) is Tensor
        and num_batches_tracked.dtype == torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == input.device
    ):  # wrong, or unusual
        _check_counter(num_batches_tracked, input)
    if eps < 0.0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")

    uses_batch = training or running_mean is None
    if uses_batch and group is None and input.numel() == input.shape[1]:
        raise ValueError(
            "input: expected more than one value per channel in training, "
            f"got shape {_shape(input)}"
        )
    is_block = activation is not None or residual is not None
    if is_block:
        residual = _check_block(input, residual, activation)
    if not training and (uses_batch or not is_block):
        output = _torch_batch_norm(input, running_mean, running_var, weight, bias, eps)
        return _add_and_activate(output, residual, activation, activation_slope)
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum)
    steps = ops.steps_for(input, weight, bias, residual, *running[:3])
    exporting = in_plain_torch = False
    if steps is ops.OPERATORS:
        # is_exporting() is this, but in a graph that torch 2.11 compiles, where it is always true
        exporting = torch.compiler._is_exporting_flag
        # Transformed or exported, a layer is made of operators that torch can differentiate.
        in_plain_torch = (
            exporting
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0  # inside torch.autograd.forward_ad.dual_level
        )
    if not training and in_plain_torch:
        output = _torch_batch_norm(input, running_mean, running_var, weight, bias, eps)
        return _add_and_activate(output, residual, activation, activation_slope)
    if exporting and group is not None:
        raise RuntimeError(
            "torch.export: expected a layer in eval mode, or a process that is alone; got SyncBN "
            f"layer {layer_name!r} in training with {dist.get_world_size(group)} ranks, and a "
            "graph of operators would have no gradients"
        )
    if exporting and momentum is not None:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        output = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        return _add_and_activate(output, residual, activation, activation_slope)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if in_plain_torch:
        output = differentiable.batch_norm(input, weight, bias, running, eps, group, layer_name)
        return _add_and_activate(output, residual, activation, activation_slope)
    alone = training and activation is None
    layer = eps, group, layer_name, not training, activation, activation_slope, alone
    if steps is not ops.OPERATORS:
        return SyncBatchNormFunction.run(
            input, weight, bias, residual, running, Setting(*layer, steps)
        )
    buffers = () if torch._C._get_tracing_state() is None else running[:3]
    return SyncBatchNormFunction.apply(
        input, weight, bias, residual, running, Setting(*layer), *buffers
    )


def _add_and_activate(
    output: Tensor, residual: Tensor | None, activation: str | None, slope: float
) -> Tensor:
    return activate(output if residual is None else output + residual, activation, slope)


def activate(output: Tensor, activation: str | None, slope: float) -> Tensor:
    """An activation, or none, by operators that torch can differentiate."""
    if activation is None:
        return output
    function = ACTIVATIONS[activation]
    return function.value(output, slope if function.takes_slope else 0.0)


def _check_block(input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """The residual, in the dtype of the input."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected None or one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    if residual is None:
        return None
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a torch.Tensor or None, got {type(residual).__name__}")
    if residual.shape != input.shape or residual.device != input.device:
        raise ValueError(
            f"residual: expected shape {_shape(input)} on {input.device}, those of the input; "
            f"got {_shape(residual)} on {residual.device}"
        )
    if residual.dtype not in _DTYPES:
        raise TypeError(
            f"residual: expected float16, bfloat16, float32 or float64, got {residual.dtype}"
        )
    return residual.to(input.dtype)


def _torch_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """torch's own batch_norm, in dtypes that it takes beside the input's; of this rank's batch if
    there are no running statistics.
    """
    tensors: tuple[Any, ...] = (running_mean, running_var, weight, bias)
    if any(tensor is not None and tensor.dtype != input.dtype for tensor in tensors):
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
    mean, variance, weight, bias = tensors
    return F.batch_norm(input, mean, variance, weight, bias, training=mean is None, eps=eps)


def _group_to_synchronize(process_group: Any) -> Any:
    """The group whose ranks share their statistics, or None if this process is alone."""
    if process_group is not None:
        group = groups.resolve(process_group)
    elif _HAS_DISTRIBUTED and dist.is_initialized():
        group = dist.group.WORLD  # torch 2.11 cannot compile a look at one that is not there
    else:
        return None
    return None if group is None or group.size() == 1 else group


def _check_tensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if not (
        type(input) is Tensor
        and input.dtype in _DTYPES
        and input.layout is torch.strided
        and not input.is_nested
        and input.dim() > 1
        and input.size(1) > 0
    ):  # wrong, or unusual
        _check_input(input)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{missing}: expected a tensor, as the other running statistic is one; got None"
        )
    one_per_channel, device = (input.size(1),), input.device
    for tensor in (weight, bias, running_mean, running_var):
        if tensor is not None and not (
            type(tensor) in _PLAIN_TYPES
            and tensor.dtype in _DTYPES
            and tensor.shape == one_per_channel
            and tensor.device == device
            and tensor.is_contiguous()
        ):  # wrong, or unusual
            _check_per_channel("weight", weight, input)
            _check_per_channel("bias", bias, input)
            _check_per_channel("running_mean", running_mean, input)
            _check_per_channel("running_var", running_var, input)
            break


def _check_input(input: Tensor) -> None:
    """Raise where this is no tensor of this rank that can be normalized."""
    _check_kind("input", "torch.Tensor", input)
    if input.layout is not torch.strided or input.is_nested:
        kind = "nested" if input.is_nested else str(input.layout).removeprefix("torch.")
        raise TypeError(f"input: expected a dense torch.Tensor, got a {kind.strip('_')} one")
    if input.dtype not in _DTYPES:
        raise TypeError(f"input: expected float16, bfloat16, float32 or float64, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input: expected shape (N, C, *spatial), got {_shape(input)}")
    if input.shape[1] == 0:
        raise ValueError(f"input: expected at least one channel, got shape {_shape(input)}")


def _check_per_channel(name: str, tensor: Tensor | None, input: Tensor) -> None:
    """Raise where this is not a tensor with a number for each channel of the input."""
    if tensor is None:
        return
    _check_kind(name, "torch.Tensor or None", tensor)
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )
    if tensor.shape != input.shape[1:2]:
        raise ValueError(
            f"{name}: expected shape ({input.shape[1]},), the channels of an input "
            f"{_shape(input)}; got {_shape(tensor)}"
        )
    if tensor.device != input.device:
        raise ValueError(
            f"{name}: expected device {input.device}, that of the input; got {tensor.device}"
        )
    if not tensor.is_contiguous() and name.startswith("running"):
        raise ValueError(f"{name}: expected contiguous memory, got stride {tensor.stride()}")


def _check_kind(name: str, expected: str, tensor: Any) -> None:
    """Raise TypeError where this is no tensor of this rank."""
    distributed = sys.modules.get("torch.distributed.tensor")  # imported where there is one
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise TypeError(f"{name}: expected this rank's {expected}, got a DTensor")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a {expected}, got {type(tensor).__name__}")


def _check_counter(num_batches_tracked: Tensor, input: Tensor) -> None:
    dtype = getattr(num_batches_tracked, "dtype", None)
    if dtype is None or dtype.is_complex or dtype == torch.bool:
        got = dtype or type(num_batches_tracked).__name__
        raise TypeError(f"num_batches_tracked: expected a tensor of numbers or None, got {got}")
    if num_batches_tracked.numel() != 1 or num_batches_tracked.device != input.device:
        raise ValueError(
            f"num_batches_tracked: expected one number on {input.device}, that of the input; "
            f"got shape {_shape(num_batches_tracked)} on {num_batches_tracked.device}"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
