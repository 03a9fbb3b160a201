"""What a block is held to: activation(batch normalization + residual) in torch's float64."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

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


def exact(activation, input, grad_output, weight, bias, residual=None, statistics=None):
    """One training step in float64; with the statistics (mean, variance) that are given, if any."""
    leaves = [
        None if tensor is None else tensor.detach().double().requires_grad_()
        for tensor in (input, weight, bias, residual)
    ]
    mean, variance = (None, None) if statistics is None else (s.double() for s in statistics)
    z = F.batch_norm(leaves[0], mean, variance, *leaves[1:3], statistics is None, eps=EPS)
    if residual is not None:
        z = z + leaves[3]
    output = ACTIVATIONS[activation](z)
    output.backward(grad_output.double())
    return Gradients(output.detach(), *(None if leaf is None else leaf.grad for leaf in leaves))
