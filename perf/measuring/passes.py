"""The passes of a layer that are measured, and the bytes that each cannot do without."""

from typing import Any

import torch
from torch import Tensor

from measuring.times import Call

PASSES = ("forward", "backward", "both")
# Reads and writes of the input's bytes, T: forward reads x for the statistics, reads it again and
# writes y; backward reads x and dy twice and writes dx.
TRANSFERS = {"forward": 3, "backward": 5, "both": 8}


def calls_of_passes(
    layer: torch.nn.Module, input: Tensor, grad_output: Tensor, in_place: bool = False
) -> dict[str, Call]:
    """A call for each of PASSES. Prepared, and not timed, are the forward of a backward and, for a
    layer that works `in_place`, a copy of the input.
    """
    input = input.detach().requires_grad_()
    leaves = [input, *layer.parameters()]

    def fresh_input() -> Tensor:
        return input.clone() if in_place else input

    def forward(given: Tensor) -> Tensor:
        return layer(given)

    def backward(output: Tensor) -> Any:
        # what is retained is freed with the output; a CUDA graph replays a backward many times
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return {
        "forward": Call(forward, fresh_input),
        "backward": Call(backward, lambda: forward(fresh_input())),
        "both": Call(lambda given: backward(forward(given)), fresh_input),
    }
