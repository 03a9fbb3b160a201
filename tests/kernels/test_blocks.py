"""Kernels of whole blocks, activation(batch norm + residual): exact, and how many bytes they move.

With T the bytes of x, the four kernels together move 8 T, with a residual 9 T; ReLU adds nothing
without a residual. With one the gradient of the residual is a map of its own (T), and ReLU leaves a
gate of one bit per element, which is written once and read twice.
"""

import contextlib
import os

import pytest
import torch

from tests.support import blocks, interpreter, oracle
from tests.support.blocks import EPS, SLOPE
from tests.support.inputs import LAYOUTS, random
from tests.support.steps import kernel
from triton_syncbn import ops, reference
from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.operands import NOT_TRACKED, BlockOperands, RunningStatistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows of odd length, which share vectors, and the bytes of eight gates; channels for one byte.
SMALL = {"channels_first": (4, 2, 3, 5), "channels_last": (2, 8, 3, 5)}
SHAPES = {"vectors": (3, 16, 4, 8), "odd rows": (2, 8, 5, 7), "no vectors": (3, 5, 3, 7)}

MANY = (2, 24, 5, 7)  # channels


class Block:
    """A block's tensors and its steps, one launch each."""

    def __init__(self, step, activation, residual, layout, dtype, shape, frozen, device):
        self.step, self.activation, self.frozen = step, activation, frozen
        self.x, self.dy, extra = (
            random(shape, dtype, device, layout, seed=seed) for seed in range(3)
        )
        self.weight, self.bias, mean, variance = (
            random(shape[1:2], torch.float32, device, mean=2.0, seed=seed) for seed in range(3, 7)
        )
        self.statistics = (mean, variance.abs() + 0.5) if frozen else None
        self.residual = extra if residual else None
        self.gates = None
        if residual and activation and ACTIVATIONS[activation].gated:
            self.gates = ops.new_gates(self.x, True).fill_(255)

    def run(self):
        """y and all gradients."""
        running = RunningStatistics(*self.statistics) if self.frozen else NOT_TRACKED
        block = BlockOperands(self.activation, SLOPE, self.residual, self.gates)
        moments = None if self.frozen else self.step("moments")(self.x)
        output = self.step("normalize")(
            self.x,
            moments,
            self.weight,
            self.bias,
            eps=EPS,
            running=running,
            block=block,
        )
        if not self.activation or self.gates is not None:
            block = block._replace(residual=None)
        block = block._replace(weight=self.weight, bias=self.bias, running=running)
        sums, grad_weight, grad_bias = self.step("grad_moments")(
            *(self.dy, self.x, moments, torch.float32, torch.float32, EPS, block)
        )
        grad_residual = None if self.residual is None else torch.empty_like(self.x)
        grad_input = self.step("grad_input")(
            *(self.dy, self.x, moments, None if self.frozen else sums, self.weight, EPS),
            block._replace(grad_residual=grad_residual),
        )
        return blocks.Gradients(output, grad_input, grad_weight, grad_bias, grad_residual)

    def center(self):
        """Take the means off the data."""
        for tensor in (self.x, self.dy, self.residual):
            if tensor is not None:
                tensor -= 0.5

    def exact(self):
        return blocks.exact(*self.operands(), statistics=self.statistics)

    def in_float32(self):
        return blocks.eager(*self.operands(), statistics=self.statistics, dtype=torch.float32)

    def operands(self):
        return self.activation, self.x, self.dy, self.weight, self.bias, self.residual


def check(block, dtype):
    actual, exact = (
        blocks.Gradients(*(None if tensor is None else tensor.cpu() for tensor in result))
        for result in (block.run(), block.exact())
    )
    assert not blocks.faults(actual, exact, dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_exact(activation, dtype, layout, residual, device):
    step = lambda name: kernel(name, device)  # noqa: E731
    check(Block(step, activation, residual, layout, dtype, SMALL[layout], False, device), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_is_as_exact_as_torchs_operators(activation, layout, residual, device):
    """y and dx, by the norm over many channels, which are as many draws.

    In the interpreter the operators are those of a CPU, and means are near 0: where a mean is half
    a deviation y is up to 5 % worse, as torch's loop there does not subtract it; from a whole
    deviation on it is better.
    """
    step = lambda name: kernel(name, device)  # noqa: E731
    block = Block(step, activation, residual, layout, torch.float32, MANY, False, device)
    names = ["output", "input", "residual"] if residual else ["output", "input"]
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            block.center()
            stack.enter_context(interpreter.products_added_as_on_a_gpu())
            stack.enter_context(interpreter.sums_as_on_a_gpu())
        actual = block.run()
    exact, torchs = block.exact(), block.in_float32()
    for name in names:
        mine, theirs = (
            oracle.relative_error(getattr(result, name), getattr(exact, name))
            for result in (actual, torchs)
        )
        assert mine <= theirs, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_arguments_of_an_activation(activation, device):
    """exp overflows at 88.7, and what corrects it must not make a NaN of that."""
    ends = torch.tensor([60.0, 87.0, 88.0, 88.5, 88.8, 90.0, 103.0, 105.0, 200.0, 1e4, 1e30])
    z = torch.cat([-ends, ends, torch.tensor([0.0, 1e-30])]).view(1, 1, 3, 8).to(device)
    frozen = RunningStatistics(torch.zeros(1, device=device), torch.ones(1, device=device))
    block = BlockOperands(activation, SLOPE, None, None)
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(interpreter.products_added_as_on_a_gpu())
        settings = {"eps": 0.0, "running": frozen}
        output = kernel("normalize", device)(z, None, None, None, **settings, block=block)
        grad = kernel("grad_input", device)(
            torch.ones_like(z), z, None, None, None, 0.0, block._replace(running=frozen)
        )
    exact = z.cpu().double().requires_grad_()
    expected = blocks.ACTIVATIONS[activation](exact)
    expected.sum().backward()
    torch.testing.assert_close(output.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_blocks_are_exact_whatever_their_tensors(activation, shape, layout, dtype, frozen, device):
    step = lambda name: kernel(name, device)  # noqa: E731
    check(Block(step, activation, True, layout, dtype, SHAPES[shape], frozen, device), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_are_those_of_the_reference(shape, layout, device):
    """So a forward in one implementation and a backward in the other fit together."""
    kept = []
    for step in (lambda name: kernel(name, device), lambda name: getattr(reference, name)):
        block = Block(step, "relu", True, layout, torch.bfloat16, SHAPES[shape], False, device)
        block.run()
        kept.append(block.gates)
    assert torch.equal(*kept)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("activation", "residual", "forward", "backward"),
    [
        ("relu", False, 3, 5),
        ("silu", False, 3, 5),
        (None, True, 4, 5),
        ("relu", True, 4 + 1 / 16, 6 + 1 / 8),
        ("silu", True, 4, 8),
    ],
)
def test_bytes_of_a_block(activation, residual, forward, backward, layout):
    device = torch.device("cpu")
    moved = {}

    def metered(name):
        def run(*arguments, **settings):
            if activation is None and name == "grad_input":
                *arguments, block = arguments  # the gradient of the residual is that of y itself
                arguments.append(block._replace(grad_residual=None))
            with interpreter.metered() as meter:
                result = kernel(name, device)(*arguments, **settings)
            # a map has elements of two bytes, gates are bytes; all else is float32 or float64
            moved[name] = sum(lanes.size * size for _, lanes, size in meter.accesses if size <= 2)
            return result

        return run

    shape = SHAPES["vectors"]
    block = Block(metered, activation, residual, layout, torch.bfloat16, shape, False, device)
    block.run()
    maps = block.x.numel() * block.x.itemsize
    assert moved["moments"] + moved["normalize"] == forward * maps
    assert moved["grad_moments"] + moved["grad_input"] == backward * maps
