"""What surrounds a batch norm in a block: y = activation(batch_norm(x) + residual).

The argument of the activation, z, is not kept for backward. Without a residual it is computed again
from x. With one, an activation whose derivative has two values leaves a gate of one bit per
element, eight to a byte where vectors hold eight elements and else one to a byte; any other reads
the residual again.
"""

import functools
import types
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.operands import BlockOperands


class Block(NamedTuple):
    """What a kernel knows of the block when it is compiled, as one `BLOCK: tl.constexpr`."""

    activate: Any  # jitted, of z and the slope; None: y is z
    derivative: Any
    slope: float
    gated: bool  # the derivative has two values, 1 and the slope
    reads_residual: bool
    gates_of_byte: int  # 0: there are no gates; 1 or 8


BATCH_NORM_ALONE = Block(None, None, 0.0, False, False, 0)


def block_of(operands: BlockOperands, input: torch.Tensor) -> Block:
    """The block of these operands; how many gates a byte has is seen."""
    activation, slope, residual, gates, *_ = operands
    if activation is None and residual is None:
        return BATCH_NORM_ALONE
    gates_of_byte = 0
    if gates is not None:
        gates_of_byte = 1 if gates.numel() == input.numel() else 8
    in_float32 = input.dtype == torch.float32
    return _block(activation, slope, residual is not None, gates_of_byte, in_float32)


@functools.cache
def _block(
    activation: str | None, slope: float, residual: bool, gates_of_byte: int, in_float32: bool
) -> Block:
    if activation is None:
        return Block(None, None, 0.0, False, residual, 0)
    value, derivative, takes_slope, gated = ACTIVATIONS[activation]
    slope = slope if takes_slope else 0.0
    activate, derivative = (_jitted(function, in_float32) for function in (value, derivative))
    return Block(activate, derivative, slope, gated, residual, gates_of_byte)


@functools.cache
def _jitted(function: types.FunctionType, in_float32: bool) -> Any:
    """A function of activations.py for Triton: its text, with Triton's functions for torch's.

    Triton's `/` and exp are off by two units in the last place of float32 and more, which is
    nothing in a map of half precision, and more than torch's operators in one of float32.
    """
    exact = (div_rounded, reciprocal_rounded, exp_rounded)
    functions = exact if in_float32 else (div, reciprocal, exp)
    names = dict(zip(("div", "reciprocal", "exp"), functions, strict=True))
    names |= {"tl": tl, "erf": erf, "where": where}
    return triton.jit(types.FunctionType(function.__code__, names, function.__name__))


@triton.jit
def div(x, y):
    return x / y


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def div_rounded(x, y):
    return tl.div_rn(x, y)


@triton.jit
def reciprocal_rounded(x):
    return tl.div_rn(tl.zeros_like(x) + 1.0, x)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def exp_rounded(x):
    """2**(x * log2(e)), and then what the rounding of x * log2(e) has left out."""
    exponent = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950408889634, -exponent) + x * 1.925963033500011e-08  # of log2(e) itself
    power = tl.exp2(exponent)
    exact = tl.fma(power, rest * 0.6931471805599453, power)
    return tl.where(tl.abs(exponent) < 128.0, exact, power)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def load_residual(residual, tile, mask, BLOCK: tl.constexpr):
    """The residual of a tile; where there is none, something unused."""
    if BLOCK.reads_residual:
        return tl.load(residual + tile.offsets, mask=mask, other=0.0)
    else:
        return tile.end


@triton.jit
def before_activation(deviation, scale, shift, added, TILING: tl.constexpr, BLOCK: tl.constexpr):
    """z, of x - mean and the residual: the same bits in every kernel."""
    z = tl.fma(deviation, scale, shift)
    if BLOCK.reads_residual:
        z += added.to(TILING.compute)
    return z


@triton.jit
def store_gates(gates, z, tile, TILING: tl.constexpr, BLOCK: tl.constexpr):
    """Keep of each z whether the derivative is 1."""
    opened = (BLOCK.derivative(z, BLOCK.slope) == 1.0).to(tl.int32)
    if BLOCK.gates_of_byte == 1:
        tl.store(gates + tile.offsets, opened.to(tl.uint8), mask=tile.mask)
    else:
        bits = tl.reshape(opened, TILING.bytes_and_bits) << tl.arange(0, 8)[None, None, :]
        byte = tl.arange(0, TILING.block_columns // 8)[None, :]
        value = tl.sum(bits, axis=2).to(tl.uint8)
        tl.store(gates + (tile.start // 8 + byte), value, mask=byte * 8 < tile.end)


@triton.jit
def load_gates(gates, tile, TILING: tl.constexpr, BLOCK: tl.constexpr):
    """The gates of a tile as they lie in memory; where there are none, something unused."""
    if BLOCK.gates_of_byte == 0:
        return tile.end
    elif BLOCK.gates_of_byte == 1:
        return tl.load(gates + tile.offsets, mask=tile.mask, other=0)
    else:
        byte = tl.arange(0, TILING.block_columns // 8)[None, :]
        offsets = tile.start // 8 + byte
        return tl.load(gates + offsets, mask=byte * 8 < tile.end, other=0)


@triton.jit
def gradient_of_z(grad, z, gates, TILING: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient before the activation, from that after it and from z or the gates."""
    if BLOCK.activate is None:
        return grad
    elif BLOCK.gated:
        if BLOCK.gates_of_byte == 0:
            is_open = BLOCK.derivative(z, BLOCK.slope) == 1.0
        elif BLOCK.gates_of_byte == 1:
            is_open = gates != 0
        else:
            bits = gates[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)
            is_open = tl.reshape(bits & 1, TILING.tile) != 0
        closed = grad * BLOCK.slope if BLOCK.slope != 0.0 else tl.zeros_like(grad)
        return tl.where(is_open, grad, closed)
    else:
        return grad * BLOCK.derivative(z, BLOCK.slope)
