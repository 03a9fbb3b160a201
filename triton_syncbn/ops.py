"""The four steps as operators of torch: `torch.ops.triton_syncbn.*`, with schemas and shapes that
torch.compile can trace.

Each runs the Triton kernel where there is one for the device, the CPU path on a CPU, else the
plain-torch reference.
Inputs are floating-point tensors (N, C, *spatial) of any strides; results lie in memory as the
input does if that is dense in either layout (channels first or channels last), else channels first.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, reference
from .cpu import blocks as cpu_blocks
from .operands import BlockOperands, RunningStatistics, by_keyword

_BUFFERS = (
    "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
    "Tensor(c!)? num_batches_tracked=None, float? momentum=None"
)
_STATISTICS = "Tensor? running_mean=None, Tensor? running_var=None"
_ACTIVATION = "str? activation=None, float activation_slope=0.0"
# A step of a block is an operator of its own, `_block`, as each argument that an operator may have
# costs time, of a layer alone, too. Where it makes a second map it returns two tensors, the second
# empty if it is not asked for. A layer without running statistics takes `normalize_block`: torch
# 2.13 cannot compile an operator that returns one tensor and is given nothing that it may change.
_SCHEMAS = {
    "moments": "(Tensor input) -> Tensor",
    "moments_block": "(Tensor input) -> Tensor",
    "normalize": (
        f"(Tensor input, Tensor moments, Tensor? weight, Tensor? bias, *, {_BUFFERS}, float eps) "
        "-> Tensor"
    ),
    "normalize_block": (
        f"(Tensor input, Tensor? moments, Tensor? weight, Tensor? bias, *, {_BUFFERS}, float eps, "
        f"Tensor? residual=None, bool keeps_gates=False, {_ACTIVATION}) -> (Tensor, Tensor)"
    ),
    "grad_moments": (
        "(Tensor grad_output, Tensor input, Tensor moments, ScalarType? weight_dtype, "
        "ScalarType? bias_dtype, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "grad_moments_block": (
        "(Tensor grad_output, Tensor input, Tensor? moments, ScalarType? weight_dtype, "
        "ScalarType? bias_dtype, float eps, *, Tensor? weight=None, Tensor? bias=None, "
        f"{_STATISTICS}, Tensor? residual=None, Tensor? gates=None, {_ACTIVATION}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "grad_input": (
        "(Tensor grad_output, Tensor input, Tensor moments, Tensor grad_moments, Tensor? weight, "
        "float eps) -> Tensor"
    ),
    "grad_input_block": (
        "(Tensor grad_output, Tensor input, Tensor? moments, Tensor? grad_moments, "
        f"Tensor? weight, float eps, *, Tensor? bias=None, {_STATISTICS}, Tensor? residual=None, "
        f"Tensor? gates=None, bool makes_residual=False, {_ACTIVATION}) -> (Tensor, Tensor)"
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
def _backend(device_type: str) -> Any:
    """The module whose four steps run on a type of device."""
    if device_type == "cuda" or (
        device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    ):
        try:
            from .kernels import launchers

            return launchers
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            warnings.warn(
                "Triton is not installed: SyncBN runs in plain torch, which is slow", stacklevel=2
            )
    return cpu if device_type == "cpu" else reference


def _backend_of_blocks(backend: Any) -> Any:
    """The same, but for the CPU path, which has a module of its own for blocks."""
    return cpu_blocks if backend is cpu else backend


def new_gates(input: Tensor, any_are_kept: bool) -> Tensor:
    """What keeps the gates of a block (see kernels/blocks.py), uint8, empty if none are kept. One
    of them for each element; or for eight, in a kernel where they lie in one vector of one program,
    on the CPU path where they fill bytes.
    """
    elements = input.numel() if any_are_kept else 0
    packed = elements % 8 == 0
    if input.device.type != "cpu" or _backend("cpu") is not cpu:
        one_position = math.prod(input.shape[2:]) == 1
        channels_last = one_position or (is_channels_last(input) and not input.is_contiguous())
        packed = packed and input.itemsize == 2 and not (channels_last and input.shape[1] % 8)
    return input.new_empty(elements // 8 if packed else elements, dtype=torch.uint8)


def _normalize_block(
    backend: Any,
    input: Tensor,
    moments: Tensor | None,
    *parameters: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    keeps_gates: bool = False,
    activation: str | None = None,
    activation_slope: float = 0.0,
    **buffers: Any,
) -> tuple[Tensor, Tensor]:
    gates = new_gates(input, keeps_gates)
    running = _running(**buffers)
    if moments is not None:
        running = unless_again(running)
        if activation is None and residual is None:
            settings = {"eps": eps, "running": running}
            return backend.normalize(input, moments, *parameters, **settings), gates
    kept = gates if keeps_gates else None
    block = BlockOperands(activation, activation_slope, _beside(input, residual), kept)
    settings = {"eps": eps, "running": running, "block": block}
    return _backend_of_blocks(backend).normalize(input, moments, *parameters, **settings), gates


def unless_again(running: RunningStatistics) -> RunningStatistics:
    """What a forward moves. In a backward activation checkpointing computes one again, whose batch
    the running statistics have seen. Decided here, as a compiled graph has no other place for it.
    """
    if torch._C._current_graph_task_id() == -1:
        return running
    return RunningStatistics(momentum=running.momentum)


def _running(
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
) -> RunningStatistics:
    return RunningStatistics(running_mean, running_var, num_batches_tracked, momentum)


def _grad_moments_block(
    backend: Any, grad_output: Tensor, input: Tensor, *arguments: Any, **operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    block = _block_in_backward(input, **operands)
    return _backend_of_blocks(backend).grad_moments(grad_output, input, *arguments, block)


def _grad_input_block(
    backend: Any,
    grad_output: Tensor,
    input: Tensor,
    *arguments: Any,
    makes_residual: bool = False,
    **operands: Any,
) -> tuple[Tensor, Tensor]:
    grad_residual = torch.empty_like(input) if makes_residual else input.new_empty(0)
    block = _block_in_backward(input, **operands)
    if makes_residual:
        block = block._replace(grad_residual=grad_residual)
    gradient = _backend_of_blocks(backend).grad_input(grad_output, input, *arguments, block)
    return gradient, grad_residual


def _block_in_backward(
    input: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    **operands: Any,
) -> BlockOperands:
    running = _running(running_mean, running_var)
    return BlockOperands(running=running, residual=_beside(input, residual), **operands)


def _beside(input: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual as a step is given it, in memory as the input is."""
    return None if residual is None else laid_out_like(residual, input)


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


def _normalize_shape(input: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    return torch.empty_like(dense(input))


def _normalize_block_shape(
    input: Tensor, *arguments: Any, keeps_gates: bool = False, **settings: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(input)), new_gates(input, keeps_gates)


def _grad_moments_shape(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    *settings: Any,
    **block: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = input.shape[1]
    return (
        input.new_empty(2 * channels, dtype=torch.float64),
        input.new_empty(channels if weight_dtype else 0, dtype=weight_dtype or torch.float32),
        input.new_empty(channels if bias_dtype else 0, dtype=bias_dtype or torch.float32),
    )


def _grad_input_shape(grad_output: Tensor, input: Tensor, *arguments: Any, **block: Any) -> Tensor:
    return torch.empty_like(dense(input))


def _grad_input_block_shape(
    grad_output: Tensor, input: Tensor, *arguments: Any, makes_residual: bool = False, **block: Any
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(dense(input))
    return gradient, torch.empty_like(gradient) if makes_residual else input.new_empty(0)


class Steps(NamedTuple):
    """A function for each step: of a layer as in reference.py, of a block as its operator. But for
    the operators themselves, they take an input that is dense, and what lies in memory as it does;
    and `normalize` the running statistics that `unless_again` leaves.
    """

    moments: Callable[..., Any]
    normalize: Callable[..., Any]
    grad_moments: Callable[..., Any]
    grad_input: Callable[..., Any]
    moments_block: Callable[..., Any]
    normalize_block: Callable[..., Any]
    grad_moments_block: Callable[..., Any]
    grad_input_block: Callable[..., Any]


_SHAPES = Steps(
    *(_moments_shape, _normalize_shape, _grad_moments_shape, _grad_input_shape),
    *(_moments_shape, _normalize_block_shape, _grad_moments_shape, _grad_input_block_shape),
)


@functools.cache
def _steps_on(device_type: str) -> Steps:
    """The steps on tensors of the current device of a type."""
    backend = _backend(device_type)
    return Steps(
        backend.moments,
        backend.normalize,
        backend.grad_moments,
        backend.grad_input,
        _backend_of_blocks(backend).moments,
        functools.partial(_normalize_block, backend),
        functools.partial(_grad_moments_block, backend),
        functools.partial(_grad_input_block, backend),
    )


def _implementation(name: str) -> Callable[..., Any]:
    """What an operator runs, on the device of its tensors: Triton launches on the current one."""

    def run(*arguments: Any, **settings: Any) -> Any:
        device = arguments[0].device
        step = getattr(_steps_on(device.type), name)
        if name.startswith("grad"):
            grad_output, input, *others = arguments
            input = dense(input)
            arguments = laid_out_like(grad_output, input), input, *others
        else:
            arguments = dense(arguments[0]), *arguments[1:]
        if name == "normalize":
            eps = settings.pop("eps")
            settings = {"eps": eps, "running": unless_again(_running(**settings))}
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return step(*arguments, **settings)
        with torch.cuda.device(device):
            return step(*arguments, **settings)

    return run


_library = torch.library.Library("triton_syncbn", "DEF")
for _name, _shape in zip(Steps._fields, _SHAPES, strict=True):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _operator = _refusing_gradients(_name, _implementation(_name))
    _library.impl(_name, _operator, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"triton_syncbn::{_name}", _shape, lib=_library)

moments = torch.ops.triton_syncbn.moments.default
normalize = torch.ops.triton_syncbn.normalize.default
grad_moments = torch.ops.triton_syncbn.grad_moments.default
grad_input = torch.ops.triton_syncbn.grad_input.default
moments_block = torch.ops.triton_syncbn.moments_block.default
normalize_block = torch.ops.triton_syncbn.normalize_block.default
grad_moments_block = torch.ops.triton_syncbn.grad_moments_block.default
grad_input_block = torch.ops.triton_syncbn.grad_input_block.default


def _operator_normalize(
    input: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    running: RunningStatistics,
) -> Tensor:
    return normalize(input, moments, weight, bias, **by_keyword(running), eps=eps)


OPERATORS = Steps(
    *(moments, _operator_normalize, grad_moments, grad_input),
    *(moments_block, normalize_block, grad_moments_block, grad_input_block),
)
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_profiled = torch.autograd._profiler_enabled
_is_transformed = torch._C._are_functorch_transforms_active
_traced = torch._C._get_tracing_state


def steps_for(input: Tensor, *others: Tensor | None) -> Steps:
    """`OPERATORS`; or what they run, as torch's dispatcher takes 3 us for each, of plain tensors on
    the current device, where nothing records, profiles or transforms what is called.

    The steps themselves are to be called without grad mode.
    """
    if (
        torch.compiler.is_compiling()
        or type(input) is not Tensor
        or not _PLAIN_TYPES.issuperset(map(type, others))
        or _dispatch_modes()
        or _function_modes()
        or _is_profiled()
        or _is_transformed()
        or _traced() is not None
        or forward_ad._current_level >= 0  # inside torch.autograd.forward_ad.dual_level
        or torch.compiler._is_exporting_flag
        or (input.is_cuda and input.device.index != torch.cuda.current_device())
    ):
        return OPERATORS
    return _steps_on("cpu" if input.is_cpu else input.device.type)
