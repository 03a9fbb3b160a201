"""The steps of a block, activation(batch norm + residual), on a CPU; as `reference` in all but
precision and time.

All arithmetic is float64, and a map is rounded once, at its end: nothing else in its precision is
closer to what is right. What float64 costs is won back in pieces of the maps that the cache of a
core holds, in buffers that a thread keeps, and in loops of torch that go once over a piece where
the definitions in `activations` go over it for each of their operators.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..activations import ACTIVATIONS
from ..operands import LAYER_ALONE, NOT_TRACKED, BlockOperands, RunningStatistics
from .layer import moments as moments_of_layer
from .memory import buffer
from .statistics import keep_statistics, statistics_of
from .sums import batch_norm_backward

PIECE = 1 << 18  # elements of a piece: 2 MiB in float64; as measured
LEAST_OF_THREAD = 1 << 15  # elements below which torch gives a thread nothing to do
VALUES, ARGUMENT, GRADIENT, SPARE = range(4)  # buffers: x, z, the gradient, and what comes and goes
# Times eight bytes of 0 or 1, as one number: a bit of each, in order, in the highest byte
GATHER_BITS = sum(1 << (56 - 7 * bit) for bit in range(8))
_aten = torch.ops.aten


class Loops(NamedTuple):
    """An activation in loops of torch, which change their first argument."""

    value: Callable[[Tensor, float], Any]  # of z and the slope
    gradient: Callable[[Tensor, Tensor, float], Any]  # of the gradient after it, z and the slope
    # For maps of half precision, where no rounding of float32 shows: exp takes a third of the time
    precision_of_half: torch.dtype = torch.float64


def _gradient_of_relu(grad: Tensor, z: Tensor, slope: float) -> None:
    _aten.threshold_backward.grad_input(grad, z, 0.0, grad_input=grad)


def _gradient_of_relu6(grad: Tensor, z: Tensor, slope: float) -> None:
    """By two thresholds, as the loop that torch has lets no NaN pass."""
    _gradient_of_relu(grad, z, slope)
    _gradient_of_relu(grad, torch.neg(z, out=_buffer(z, SPARE)).add_(6.0), slope)


def _gradient_of_leaky_relu(grad: Tensor, z: Tensor, slope: float) -> None:
    _aten.leaky_relu_backward.grad_input(grad, z, slope, False, grad_input=grad)


def _gradient_of_elu(grad: Tensor, z: Tensor, slope: float) -> None:
    """Without the loop that torch has, in which a NaN is one here and none there."""
    grad.mul_(torch.clamp(z, max=0.0, out=buffer(z, z.dtype, SPARE)).nan_to_num_(nan=0.0).exp_())


def _gradient_of_silu(grad: Tensor, z: Tensor, slope: float) -> None:
    _aten.silu_backward.grad_input(grad, z, grad_input=grad)


def _gradient_of_gelu(grad: Tensor, z: Tensor, slope: float) -> None:
    _aten.gelu_backward.grad_input(grad, z, grad_input=grad)


def _gradient_of_hardswish(grad: Tensor, z: Tensor, slope: float) -> None:
    """The loop that torch has, and then what of z is NaN, as it lets some of that pass."""
    _aten.hardswish_backward.out(grad, z, out=grad)
    grad.add_(torch.clamp(z, -3.0, 3.0, out=_buffer(z, SPARE)).mul_(0.0))


LOOPS = {
    "relu": Loops(lambda z, slope: z.relu_(), _gradient_of_relu),
    "relu6": Loops(lambda z, slope: z.clamp_(0.0, 6.0), _gradient_of_relu6),
    "leaky_relu": Loops(lambda z, slope: _aten.leaky_relu_(z, slope), _gradient_of_leaky_relu),
    "elu": Loops(lambda z, slope: _aten.elu_(z), _gradient_of_elu, torch.float32),
    "silu": Loops(lambda z, slope: _aten.silu_(z), _gradient_of_silu, torch.float32),
    "gelu": Loops(lambda z, slope: _aten.gelu_(z), _gradient_of_gelu, torch.float32),
    "hardswish": Loops(lambda z, slope: _aten.hardswish_(z), _gradient_of_hardswish),
}


@functools.cache
def _by_definition(activation: str) -> Loops:
    """In a loop for each operator of the definition, for what torch has no loop of its own."""
    value, derivative, *_ = ACTIVATIONS[activation]
    return Loops(
        lambda z, slope: z.copy_(value(z, slope)),
        lambda grad, z, slope: grad.mul_(derivative(z, slope)),
    )


def moments(input: Tensor) -> Tensor:
    """Moments of each channel of (N, C, *spatial): float64 [2C + 1], sum(x), sum(x**2), count."""
    if input.dtype != torch.float32:
        return moments_of_layer(input)  # in float64, or with digits to spare
    sums = input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    mean, one = torch.zeros_like(sums[0]), torch.ones_like(sums[0])
    for channels, (values,) in _pieces(input):
        values = _wide(values)
        _add_sums(sums, channels, values, values, mean, one)
    return torch.cat((sums.view(-1), sums.new_full((1,), input.numel() // input.shape[1])))


def normalize(
    input: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    running: RunningStatistics = NOT_TRACKED,
    block: BlockOperands = LAYER_ALONE,
) -> Tensor:
    """Normalize with the global moments, and move the running statistics unless the batch is empty;
    without moments, normalize with the running statistics.
    """
    if moments is not None:
        keep_statistics(moments).move(running)
    layer = _Layer(moments, running, weight, bias, eps)
    loops, slope = _loops_of(block)
    output = torch.empty_like(input)
    gates = None if block.gates is None else torch.empty_like(input, dtype=torch.bool)
    for channels, maps in _pieces(input, block.residual, output, gates):
        values, residual, result, opened = maps
        z = layer.before_activation(values, residual, channels, _buffer(values, VALUES))
        if opened is not None:  # where the derivative is 1; elsewhere it is that slope, of 0 here
            derivative = _buffer(z, GRADIENT).fill_(1.0)
            loops.gradient(derivative, z, 0.0)
            opened.copy_(derivative)
        if loops is not None:
            z = _in_precision(z, _precision_of(loops, input.dtype), SPARE)
            loops.value(z, slope)
        result.copy_(z)
    if gates is not None and block.gates is not None:
        _pack(gates, block.gates)
    return output


def grad_moments(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy) and sum(dy * xhat) of each channel, float64 [2C], of the dy before the activation;
    gradients of weight and bias.
    """
    layer = _Layer(moments, block.running, block.weight, block.bias, eps)
    one = torch.ones_like(layer.mean)
    sums = torch.zeros((2, input.shape[1]), dtype=torch.float64)
    for channels, maps in _pieces(input, grad_output, block.residual, _unpack(block, input)):
        values, grad = _gradient_of_z(layer, block, channels, *maps)
        _add_sums(sums, channels, grad, values, layer.mean, one)
    grads, products = sums
    products *= layer.rstd
    return (
        sums.view(-1),
        input.new_empty(0) if weight_dtype is None else products.to(weight_dtype, copy=True),
        input.new_empty(0) if bias_dtype is None else grads.to(bias_dtype, copy=True),
    )


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    moments: Tensor | None,
    grad_moments: Tensor | None,
    weight: Tensor | None,
    eps: float,
    block: BlockOperands = LAYER_ALONE,
) -> Tensor:
    """weight * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the global batch."""
    layer = _Layer(moments, block.running, weight, block.bias, eps)
    scale = layer.rstd if weight is None else layer.rstd * weight
    shift = slope = None
    if grad_moments is not None:
        shift, slope = grad_moments.view(2, -1) * (scale * (-1.0 / max(layer.count, 1.0)))
    gradient = torch.empty_like(input)
    maps = grad_output, block.residual, _unpack(block, input), gradient, block.grad_residual
    for channels, parts in _pieces(input, *maps):
        *operands, result, grad_residual = parts
        values, grad = _gradient_of_z(layer, block, channels, *operands)
        if grad_residual is not None:
            grad_residual.copy_(grad)
        (factor,) = _of(channels, scale)
        grad.mul_(factor.view(-1, 1, 1))
        if slope is not None:
            out = _buffer(values, ARGUMENT)
            grad += layer.normalize(values, slope, shift, channels, out)
        result.copy_(grad)
    return gradient


def _add_sums(
    sums: Tensor, channels: slice | None, grad: Tensor, values: Tensor, mean: Tensor, one: Tensor
) -> None:
    """Add those of dy and dy * (x - mean) of a piece to [2, C]: gradients of a layer of torch."""
    vectors = _of(channels, one, None, None, mean, one)
    settings = *vectors, True, 0.0, [False, True, True]
    _, products, grads = batch_norm_backward(grad, values, *settings)
    part = sums if channels is None else sums[:, channels]
    part += torch.stack((grads, products))


class _Layer:
    """A batch norm: statistics and parameters of each channel, in float64."""

    def __init__(
        self,
        moments: Tensor | None,
        running: RunningStatistics,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        self.count = 1.0
        if moments is None:
            self.mean, self.variance, _ = reference.statistics_of_layer(None, running)
            self.rstd = (self.variance + eps).rsqrt_()
        else:
            statistics = statistics_of(moments)
            self.mean, self.variance = statistics.mean, statistics.variance
            self.count, self.rstd = statistics.count, statistics.rstd(eps)
        self.eps = eps
        self.weight, self.bias = (v if v is None else v.double() for v in (weight, bias))

    def normalize(
        self,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        channels: slice | None,
        out: Tensor,
    ) -> Tensor:
        """xhat * weight + bias, of float64 values of some channels."""
        vectors, none = _of(channels, weight, bias, self.mean, self.variance), _nothing()
        settings = *vectors, False, 0.0, self.eps
        return torch.native_batch_norm(values, *settings, out=(out, none, none))[0]

    def before_activation(
        self, values: Tensor, residual: Tensor | None, channels: slice | None, out: Tensor
    ) -> Tensor:
        """z, in the memory of `out`."""
        z = self.normalize(_wide(values), self.weight, self.bias, channels, out)
        return z if residual is None else z.add_(residual)


def _gradient_of_z(
    layer: _Layer,
    block: BlockOperands,
    channels: slice | None,
    values: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    opened: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x, and the gradient before the activation, in a buffer; both of a piece and float64."""
    loops, slope = _loops_of(block)
    precision = torch.float64 if loops is None else _precision_of(loops, values.dtype)
    values = _wide(values)
    grad = buffer(values, precision, GRADIENT).copy_(grad_output)
    if loops is not None:
        z = _buffer(values, ARGUMENT)
        if opened is None:
            layer.before_activation(values, residual, channels, z)
        else:  # an activation with gates has at 1 and 0 the derivatives of open and closed ones
            z.copy_(opened)
        loops.gradient(grad, _in_precision(z, precision, ARGUMENT), slope)
    return values, _in_precision(grad, torch.float64, GRADIENT)


def _loops_of(block: BlockOperands) -> tuple[Any, float]:
    """Of its activation, if it has one; and the slope."""
    if block.activation is None:
        return None, 0.0
    loops = LOOPS.get(block.activation) or _by_definition(block.activation)
    return loops, block.activation_slope


def _precision_of(loops: Loops, dtype: torch.dtype) -> torch.dtype:
    return loops.precision_of_half if dtype.itemsize == 2 else torch.float64


def _in_precision(map: Tensor, precision: torch.dtype, index: int) -> Tensor:
    """The map itself, or a buffer if it is of another precision."""
    return map if map.dtype == precision else buffer(map, precision, index).copy_(map)


def _wide(values: Tensor) -> Tensor:
    return _in_precision(values, torch.float64, VALUES)


def _buffer(map: Tensor, index: int) -> Tensor:
    return buffer(map, torch.float64, index)


def _of(channels: slice | None, *vectors: Tensor | None) -> list[Any]:
    """What vectors of numbers for each channel hold of some channels; None: of all."""
    if channels is None:
        return list(vectors)
    return [vector if vector is None else vector[channels] for vector in vectors]


@functools.cache
def _nothing() -> Tensor:
    """For results that nobody wants."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.float64, device="cpu")


def _pieces(input: Tensor, *others: Tensor | None) -> Iterator[tuple[slice | None, Sequence[Any]]]:
    """Pieces of dense maps that lie in memory alike, as (N, C, L, 1): the channels that they have,
    or None if they have all, and the piece of each map.
    """
    elements, (samples, channels) = input.numel(), input.shape[:2]
    if elements == 0:
        return
    positions = elements // (samples * channels)
    by_rows = input.is_contiguous() and positions > 1
    if by_rows:
        shape, strides = (samples, channels, positions, 1), (channels * positions, positions, 1, 1)
    else:  # rows of channels, to torch one sample in channels last
        shape, strides = (1, channels, samples * positions, 1), (elements, 1, channels, channels)
    maps = [map if map is None else map.as_strided(shape, strides) for map in (input, *others)]
    most = max(PIECE, LEAST_OF_THREAD * torch.get_num_threads())
    if elements <= most:
        yield None, maps
    elif not by_rows:
        yield from ((None, parts) for parts in _cut(maps, 2, most // channels))
    elif channels * positions <= most:
        yield from ((None, parts) for parts in _cut(maps, 0, most // (channels * positions)))
    else:
        for sample in _cut(maps, 0, 1):
            step = max(most // positions, 1)
            for number, parts in enumerate(_cut(sample, 1, step)):
                yield slice(number * step, (number + 1) * step), parts


def _cut(maps: Sequence[Any], dimension: int, step: int) -> Iterator[Sequence[Any]]:
    """So many of a dimension at a time, of each map."""
    step = max(step, 1)
    none = itertools.repeat(None)
    return zip(*(none if m is None else m.split(step, dimension) for m in maps), strict=False)


def _pack(opened: Tensor, gates: Tensor) -> None:
    """Keep booleans, as they lie in memory, as gates: bit i % 8 of byte i // 8, if not in bytes."""
    flat = opened.as_strided((opened.numel(),), (1,))
    if len(gates) < len(flat):
        bits = flat.view(torch.int64).mul_(GATHER_BITS).bitwise_right_shift_(56)
        gates.copy_(bits.bitwise_and_(255))
    else:
        gates.copy_(flat)


def _unpack(block: BlockOperands, input: Tensor) -> Tensor | None:
    """A byte for each gate, in memory as the input is; 1 if it is open."""
    gates = block.gates
    if gates is None:
        return None
    if len(gates) < input.numel():
        gates = _bytes_of_gates().index_select(0, gates.int()).view(torch.uint8)
    return gates.as_strided(input.shape, input.stride())


@functools.cache
def _bytes_of_gates() -> Tensor:
    """For each byte of gates eight bytes of one each, [256] as int64."""
    with torch.inference_mode(False):
        bits = torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1
        return bits.to(torch.uint8).view(torch.int64).view(-1)
