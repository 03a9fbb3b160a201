"""What a block is held to: activation(batch normalization + residual) in torch's float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import oracle

SLOPE = 0.1
EPS = 0.01  # large enough that a gradient shows how often it was added
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


class Gradients(NamedTuple):
    """y, and the gradients of what went in; None where nothing did."""

    output: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


def exact(activation, *tensors, statistics=None):
    """One training step in float64; with the statistics (mean, variance) that are given, if any.

    On a CPU, as hardswish on a GPU divides float64 by a six of float32.
    """
    on_cpu = [None if tensor is None else tensor.cpu() for tensor in tensors]
    given = None if statistics is None else [tensor.cpu() for tensor in statistics]
    results = eager(activation, *on_cpu, statistics=given, dtype=torch.float64)
    device = tensors[0].device
    return Gradients(*(None if result is None else result.to(device) for result in results))


def eager(
    activation, input, grad_output, weight, bias, residual=None, *, statistics=None, dtype
) -> Gradients:
    """One training step in torch's operators, in a dtype."""
    leaves = [
        None if tensor is None else tensor.detach().to(dtype, copy=True).requires_grad_()
        for tensor in (input, weight, bias, residual)
    ]
    mean, variance = (None, None) if statistics is None else (s.to(dtype) for s in statistics)
    z = F.batch_norm(leaves[0], mean, variance, *leaves[1:3], statistics is None, eps=EPS)
    if residual is not None:
        z = z + leaves[3]
    output = ACTIVATIONS[activation](z)
    output.backward(grad_output.to(dtype))
    return Gradients(output.detach(), *(None if leaf is None else leaf.grad for leaf in leaves))


def faults(actual, exact, dtype, torchs=None):
    """Where a result in a dtype leaves its bounds.

    Of the norm: float64 has some roundings; in float32 maps are held to the error of torch's
    operators, `torchs`, where there are any; gradients of parameters are sums that cancel, with
    some more. An element in half precision has one rounding, which may go either way where what is
    rounded is next to the middle.
    """
    found = []
    for name, value in actual._asdict().items():
        if value is None:
            continue
        expected = getattr(exact, name)
        error = oracle.relative_error(value, expected)
        if dtype == value.dtype == torch.float64:
            limit = 1e-13
        elif name in ("weight", "bias"):
            limit = 5e-6
        elif dtype.itemsize == 2:
            error = oracle.error_in_ulp(value, expected, 1e-6 * expected.abs().max())
            limit = 0.52
        elif torchs is not None:
            limit = oracle.relative_error(getattr(torchs, name), expected)
        else:
            limit = 2e-6
        if not error <= limit:
            found.append(f"{name}: {error:.2e} > {limit:.2e}")
    return found
