"""The steps of a block on a CPU against those of the plain-torch reference: maps of all shapes, in
one piece and cut into several.
"""

import pytest
import torch

from tests.support import oracle
from tests.support.blocks import EPS, SLOPE
from tests.support.inputs import EDGES, LAYOUTS, SHAPES, random
from triton_syncbn import ops, reference
from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.cpu import blocks as cpu_blocks
from triton_syncbn.operands import BlockOperands, RunningStatistics

# Activation, whether there is a residual, whether the layer is frozen.
BLOCKS = {
    "gates": ("relu", True, False),
    "gates and a slope": ("leaky_relu", True, False),
    "z from the residual": ("silu", True, False),
    "frozen": ("gelu", False, True),
    "no activation": (None, True, True),
}
# Of the norm: roundings of the reference, which computes in float32; of half precision, in which a
# number that lies next to the middle may be rounded either way.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
OF_CHANNELS = 2e-6  # numbers of channels are float32, or are made of float32 in the reference


@pytest.fixture(params=["whole", "pieces"], autouse=True)
def way(request, plain_torch, monkeypatch):
    """Pieces of a prime number of elements: they end within samples, rows and bytes of gates."""
    if request.param == "pieces":
        monkeypatch.setattr(cpu_blocks, "PIECE", 101)
        monkeypatch.setattr(cpu_blocks, "LEAST_OF_THREAD", 0)


def run(module, block, shape, dtype, layout):
    """What all steps return, and what they write."""
    activation, has_residual, is_frozen = BLOCKS[block]
    x, dy, extra = (random(shape, dtype, "cpu", layout, seed=seed) for seed in range(3))
    weight, bias, mean, variance = (
        random(shape[1:2], torch.float32, "cpu", seed=seed) for seed in range(3, 7)
    )
    running = RunningStatistics(mean, variance.abs() + 0.5, torch.tensor(3), 0.1)
    gates = None
    if has_residual and activation is not None and ACTIVATIONS[activation].gated:
        gates = ops.new_gates(x, True)
    operands = BlockOperands(activation, SLOPE, extra if has_residual else None, gates)
    moments = None if is_frozen else module.moments(x)
    settings = {"eps": EPS, "running": running, "block": operands}
    output = module.normalize(x, moments, weight, bias, **settings)
    operands = operands._replace(weight=weight, bias=bias, running=running)
    if gates is not None:
        operands = operands._replace(residual=None)
    sums, *grads = module.grad_moments(dy, x, moments, torch.float32, torch.float32, EPS, operands)
    grad_residual = torch.empty_like(x)
    operands = operands._replace(grad_residual=grad_residual)
    grad_moments = None if is_frozen else sums
    grad_input = module.grad_input(dy, x, moments, grad_moments, weight, EPS, operands)
    return {
        "output": output,
        "grad_input": grad_input,
        "grad_residual": grad_residual,
        "gates": gates,
        "running_mean": running.mean,
        "running_var": running.var,
        "counter": running.num_batches_tracked,
        "sums": sums,
        "grad_weight": grads[0],
        "grad_bias": grads[1],
    }


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loops_of_torch_do_what_activations_define(activation, residual, monkeypatch):
    monkeypatch.setitem(BLOCKS, "defined", (activation, residual, False))
    step = cpu_blocks, "defined", (6, 5, 4, 7), torch.float32, "channels_last"
    loops = run(*step)
    monkeypatch.setattr(cpu_blocks, "LOOPS", {})
    for name, defined in run(*step).items():
        if defined is None or not defined.is_floating_point():
            assert (defined is loops[name]) or torch.equal(defined, loops[name]), name
        else:
            assert oracle.relative_error(loops[name], defined) <= 1e-7, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *EDGES], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_agrees_with_the_reference(block, shape, layout, dtype):
    ours, plain = (run(module, block, shape, dtype, layout) for module in (cpu_blocks, reference))
    # Sums, and the gradient of the input, which cancels where few values are normalized, are
    # measured against their terms.
    terms = plain["grad_residual"].double().norm()
    scales = {
        "grad_input": terms / EPS**0.5,
        "sums": terms,
        "grad_weight": terms,
        "grad_bias": terms,
    }
    for name, actual in ours.items():
        expected = plain[name]
        assert (actual is None) == (expected is None), name
        if actual is None:
            continue
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride()), name
        if not actual.is_floating_point():
            assert torch.equal(actual, expected), name
            continue
        error = (actual.double() - expected.double()).norm()
        scale = max(expected.double().norm(), scales.get(name, 0.0))
        assert error <= (TOLERANCE[dtype] if actual.dim() > 1 else OF_CHANNELS) * scale, name
