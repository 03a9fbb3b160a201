"""The same input and config give the same bits, in whatever order the programs of a launch run."""

import random

import pytest
import torch

from tests.support.inputs import LAYOUTS
from tests.support.inputs import random as random_tensor
from tests.support.steps import kernel
from triton_syncbn import SyncBN

RUNS = 8


@pytest.fixture
def shuffle(monkeypatch):
    """A function that makes the interpreter run the programs of each launch in another order."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, int], list[int]] = {}
    seed = 0

    def set_grid_idx(self, x, y, z):
        size = tuple(int(n) for n in self.grid_dim)
        order = orders.setdefault(
            (seed, *size), random.Random(seed).sample(range(size[0] * size[1]), size[0] * size[1])
        )
        place = order[x * size[1] + y]
        original(self, place // size[1], place % size[1], z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)

    def again():
        nonlocal seed
        seed += 1

    return again


@pytest.mark.parametrize("splits", [4, 70])  # one group of programs, and three
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_programs_does_not_matter(layout, dtype, splits, shuffle):
    """Programs that share a channel arrive in any order; their sums are added in a fixed one."""
    from triton_syncbn.kernels.launch_config import LaunchConfig

    device = torch.device("cpu")
    input = random_tensor((4, 2, 3, 5), dtype, device, layout)
    grad_output = random_tensor((4, 2, 3, 5), dtype, device, layout, seed=1)
    config = LaunchConfig(8 if layout == "channels_last" else 1, 16, splits, 1)
    runs = []
    for _ in range(RUNS):
        shuffle()
        moments = kernel("moments", device)(input, config)
        sums, grad_weight, grad_bias = kernel("grad_moments", device)(
            grad_output, input, moments, torch.float32, torch.float32, 1e-5, config=config
        )
        runs.append((moments, sums, grad_weight, grad_bias))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def steps_from_the_same_state(rank, world_size):
    """Everything a step gives, of the same step again and again."""
    torch.manual_seed(rank)
    input, grad = torch.randn(2, 3 + rank, 4, 5, 6)
    runs = []
    for _ in range(RUNS):
        layer = SyncBN(4)
        leaf = input.clone().requires_grad_()
        output = layer(leaf)
        output.backward(grad)
        parameters = layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var
        runs.append((output.detach(), leaf.grad, *parameters))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
    return layer.state_dict()


def test_the_same_step_gives_the_same_bits(ranks):
    first, second = ranks.run(steps_from_the_same_state, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
