"""A pass is two operators and one collective: nothing else computes, and nothing else is sent."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triton_syncbn import SyncBN

MAKE_NO_NUMBERS = ("empty", "new_empty", "view", "alias", "detach")


class Operators(TorchDispatchMode):
    """Names of the operators that compute or send, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not name.startswith(MAKE_NO_NUMBERS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def operators_of_a_step(rank, world_size, block):
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is an operator
    try:
        layer = SyncBN(5, activation="relu" if block else None)
        input = torch.randn(3, 5, 4, 4, requires_grad=True)
        residual = [torch.randn(3, 5, 4, 4)] * (block == "add_relu")
        with Operators() as forward:
            output = layer(input, *residual)
        leaves, grad_output = [input, *layer.parameters()], torch.ones(3, 5, 4, 4)
        with Operators() as backward:
            torch.autograd.grad(output, leaves, grad_output)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return forward.names, backward.names


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("block", [None, "relu", "add_relu"])
def test_a_pass_is_two_operators_and_one_collective(block, world_size, reference_ranks):
    ending = "" if block is None else "_block"
    for forward, backward in reference_ranks.run(operators_of_a_step, world_size, block):
        assert forward == [f"moments{ending}", "all_reduce", f"normalize{ending}"]
        assert backward == [f"grad_moments{ending}", "all_reduce", f"grad_input{ending}"]
