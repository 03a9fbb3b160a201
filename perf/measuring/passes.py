"""The passes of a layer that are measured."""

from typing import Any

import torch
from torch import Tensor

from measuring.times import Call

PASSES = ("forward", "backward", "both")


def calls_of_passes(
    layer: torch.nn.Module,
    input: Tensor,
    grad_output: Tensor,
    *residual: Tensor,
    in_place: bool = False,
) -> dict[str, Call]:
    """A call for each of PASSES. Prepared, and not timed, are the forward of a backward and, for a
    layer that works `in_place`, a copy of the input.
    """
    input = input.detach().requires_grad_()
    residual = tuple(tensor.detach().requires_grad_() for tensor in residual)
    leaves = [input, *layer.parameters(), *residual]

    def fresh_input() -> Tensor:
        return input.clone() if in_place else input

    def forward(given: Tensor) -> Tensor:
        return layer(given, *residual)

    def backward(output: Tensor) -> Any:
        # what is retained is freed with the output; a CUDA graph replays a backward many times
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return {
        "forward": Call(forward, fresh_input),
        "backward": Call(backward, lambda: forward(fresh_input())),
        "both": Call(lambda given: backward(forward(given)), fresh_input),
    }
