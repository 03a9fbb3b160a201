"""Activations that follow a batch norm: value and derivative of each, written once, for torch and
for Triton.

The functions below take z and a slope, and use nothing but operators and the functions imported
here; `kernels/blocks.py` compiles them with Triton's functions of the same names. To add
one: a value, a derivative, a line in the table. Where torch has a loop of its own, a line in
`cpu.blocks` makes it faster on a CPU.

Derivatives at kinks are torch's: 0 where relu or relu6 begin or end. A NaN passes, as in torch. The
derivative there is that of torch's loops on a GPU: 1, of leaky_relu the slope, of silu and gelu NaN
(those on a CPU differ in relu6 and elu). Of hardswish it is NaN, as on a CPU; a GPU has 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import div, erf, exp, reciprocal, where


class Activation(NamedTuple):
    """An activation of z with a slope, which those without one ignore."""

    value: Callable[..., Any]
    derivative: Callable[..., Any]
    takes_slope: bool  # where it does not, the slope is 0
    gated: bool  # the derivative has two values, 1 and the slope: one bit per element tells which


def relu(z, slope):
    return where(z <= 0.0, 0.0, z)


def relu_derivative(z, slope):
    return where(z <= 0.0, 0.0, 1.0)


def relu6(z, slope):
    return where(z <= 0.0, 0.0, where(z >= 6.0, 6.0, z))


def relu6_derivative(z, slope):
    return where((z <= 0.0) | (z >= 6.0), 0.0, 1.0)


def leaky_relu(z, slope):
    return where(z <= 0.0, z * slope, z)


def leaky_relu_derivative(z, slope):
    return where(z > 0.0, 1.0, slope)


def elu(z, slope):
    return where(z <= 0.0, exp(where(z <= 0.0, z, 0.0)) - 1.0, z)


def elu_derivative(z, slope):
    return where(z <= 0.0, exp(where(z <= 0.0, z, 0.0)), 1.0)


def silu(z, slope):
    return div(z, 1.0 + exp(-z))


def silu_derivative(z, slope):
    small = exp(where(z >= 0.0, -z, z))
    large = reciprocal(1.0 + small)
    sigmoid = where(z >= 0.0, large, small * large)
    # 1 - sigmoid cancels where z is large; up to 2.5 its error makes up for that of sigmoid.
    rest = where(z > 2.5, small * large, 1.0 - sigmoid)
    return z * sigmoid * rest + sigmoid


def gelu(z, slope):
    return 0.5 * z * (1.0 + erf(z * 0.7071067811865476))


def gelu_derivative(z, slope):
    density = 0.3989422804014327 * exp(-0.5 * z * z)
    return 0.5 * (1.0 + erf(z * 0.7071067811865476)) + z * density


def hardswish(z, slope):
    return where(z <= -3.0, 0.0, where(z >= 3.0, z, z * (z * (1.0 / 6.0) + 0.5)))


def hardswish_derivative(z, slope):
    return where(z <= -3.0, 0.0, where(z >= 3.0, 1.0, z * (1.0 / 3.0) + 0.5))


ACTIVATIONS = {
    "relu": Activation(relu, relu_derivative, False, True),
    "relu6": Activation(relu6, relu6_derivative, False, True),
    "leaky_relu": Activation(leaky_relu, leaky_relu_derivative, True, True),
    "elu": Activation(elu, elu_derivative, False, False),
    "silu": Activation(silu, silu_derivative, False, False),
    "gelu": Activation(gelu, gelu_derivative, False, False),
    "hardswish": Activation(hardswish, hardswish_derivative, False, False),
}
