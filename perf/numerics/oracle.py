"""What is right, float64 batch normalization of the whole batch, and the distance to it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Result:
    """Tensors of one training step: y, and the gradients of its backward; `None` where there is
    nothing.
    """

    output: Any
    grad_input: Any
    grad_weight: Any = None
    grad_bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    num_batches_tracked: Any = None


def batch_norm(
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Result:
    """One training step of torch's float64 batch norm on (N, C, *spatial)."""
    leaves: list[Any] = [
        None if tensor is None else tensor.detach().double().clone().requires_grad_()
        for tensor in (input, weight, bias)
    ]
    mean = torch.zeros(input.shape[1], dtype=torch.float64, device=input.device)
    variance = torch.ones_like(mean)
    output = F.batch_norm(leaves[0], mean, variance, leaves[1], leaves[2], True, momentum, eps)
    output.backward(grad_output.double())
    grad_input, grad_weight, grad_bias = (None if leaf is None else leaf.grad for leaf in leaves)
    return Result(output.detach(), grad_input, grad_weight, grad_bias, mean, variance)


def relative_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Norm of the difference over `scale`, by default the norm of what is expected; 0 for two empty
    tensors, infinite where it is NaN.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item() if scale is None else scale
    error = difference / max(scale, 1e-300)
    return math.inf if math.isnan(error) else error
