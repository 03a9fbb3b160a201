"""The four steps as operators of torch: `torch.ops.triton_syncbn.*`, with schemas and shapes that
torch.compile can trace.

Each runs the Triton kernel where there is one for the device, the CPU path on a CPU, else the
plain-torch reference.
Inputs are floating-point tensors (N, C, *spatial) of any strides; results lie in memory as the
input does if that is dense in either layout (channels first or channels last), else channels first.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference

_SCHEMAS = {
    "moments": "(Tensor input) -> Tensor",
    "normalize": (
        "(Tensor input, Tensor moments, Tensor? weight, Tensor? bias, *, "
        "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
        "Tensor(c!)? num_batches_tracked=None, float? momentum=None, float eps) -> Tensor"
    ),
    "grad_moments": (
        "(Tensor grad_output, Tensor input, Tensor moments, ScalarType? weight_dtype, "
        "ScalarType? bias_dtype, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "grad_input": (
        "(Tensor grad_output, Tensor input, Tensor moments, Tensor grad_moments, "
        "Tensor? weight, float eps) -> Tensor"
    ),
}


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of (N, C, *spatial) lie next to each other in memory, without gaps."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous()


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if the kernels can walk its memory, else a contiguous copy."""
    if tensor.is_contiguous() or is_channels_last(tensor):
        return tensor
    return tensor.contiguous()


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor itself if it lies in memory as the dense `model` does, else a copy that does."""
    if tensor.is_contiguous() if model.is_contiguous() else is_channels_last(tensor):
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


@functools.cache
def _step(name: str, device_type: str) -> Callable[..., Any]:
    """The implementation of a step for a type of device."""
    if device_type == "cuda" or (
        device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    ):
        try:
            module = importlib.import_module(f"triton_syncbn.kernels.{name}")
            return getattr(module, name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            warnings.warn(
                "Triton is not installed: SyncBN runs in plain torch, which is slow", stacklevel=2
            )
    return getattr(cpu if device_type == "cpu" else reference, name)


def _run(name: str, *arguments: Any, **settings: Any) -> Any:
    """Run a step on the device of its tensors: Triton launches on the current one."""
    device = arguments[0].device
    step = _step(name, device.type)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return step(*arguments, **settings)
    with torch.cuda.device(device):
        return step(*arguments, **settings)


def _moments(input: Tensor) -> Tensor:
    return _run("moments", dense(input))


def _normalize(input: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    if torch._C._current_graph_task_id() != -1:
        # In a backward, so activation checkpointing computes a forward again, whose batch the
        # running statistics have seen. Decided here, as a compiled graph has no other place for it.
        settings.update(running_mean=None, running_var=None, num_batches_tracked=None)
    return _run("normalize", dense(input), *arguments, **settings)


def _grad_moments(
    grad_output: Tensor, input: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    return _run("grad_moments", laid_out_like(grad_output, input), input, *arguments)


def _grad_input(grad_output: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    input = dense(input)
    return _run("grad_input", laid_out_like(grad_output, input), input, *arguments)


class _NotDifferentiable(torch.autograd.Function):
    """Results of an operator, whose gradients are an error."""

    @staticmethod
    def forward(ctx: Any, name: str, number: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.name = name
        return tensors[:number]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"triton_syncbn::{ctx.name} is not differentiable on its own, as the sums over the "
            "ranks lie between two operators; differentiate triton_syncbn.sync_batch_norm"
        )


def _refusing_gradients(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation; its results raise if somebody differentiates them, which
    SyncBatchNormFunction does not, as it runs without grad mode.

    A kernel of autograd's own would cost every call microseconds.
    """

    def run(*arguments: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return implementation(*arguments, **settings)
        with torch.no_grad():  # which a step in torch's operations takes for granted
            results = implementation(*arguments, **settings)
        if any(getattr(argument, "requires_grad", False) for argument in arguments):
            tensors = results if isinstance(results, tuple) else (results,)
            marked = _NotDifferentiable.apply(name, len(tensors), *tensors, *arguments)
            return marked if isinstance(results, tuple) else marked[0]
        return results

    return run


def _moments_shape(input: Tensor) -> Tensor:
    return input.new_empty(2 * input.shape[1] + 1, dtype=torch.float64)


def _normalize_shape(input: Tensor, *arguments: Any, **buffers: Any) -> Tensor:
    return torch.empty_like(dense(input))


def _grad_moments_shape(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = input.shape[1]
    return (
        input.new_empty(2 * channels, dtype=torch.float64),
        input.new_empty(channels if weight_dtype else 0, dtype=weight_dtype or torch.float32),
        input.new_empty(channels if bias_dtype else 0, dtype=bias_dtype or torch.float32),
    )


def _grad_input_shape(grad_output: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(dense(input))


_library = torch.library.Library("triton_syncbn", "DEF")
for _name, _implementation, _shape in (
    ("moments", _moments, _moments_shape),
    ("normalize", _normalize, _normalize_shape),
    ("grad_moments", _grad_moments, _grad_moments_shape),
    ("grad_input", _grad_input, _grad_input_shape),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _refusing_gradients(_name, _implementation), "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"triton_syncbn::{_name}", _shape, lib=_library)

moments = torch.ops.triton_syncbn.moments.default
normalize = torch.ops.triton_syncbn.normalize.default
grad_moments = torch.ops.triton_syncbn.grad_moments.default
grad_input = torch.ops.triton_syncbn.grad_input.default
