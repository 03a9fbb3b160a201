"""Memory that nobody wrote, and lanes that a mask keeps out, reach no result.

All tests run with what torch.empty returns filled with NaN (conftest.py, ranks.py); the first test
here says that they do.
"""

import os

import pytest
import torch

from tests.support import interpreter


def uninitialized(rank: int, world_size: int) -> list[torch.Tensor]:
    """What each way to make a tensor without values returns."""
    model = torch.zeros(999)
    return [
        torch.empty(999),
        torch.empty(999, dtype=torch.float64),
        torch.empty_like(model, dtype=torch.bfloat16),
        model.new_empty(999),
    ]


def test_tensors_without_values_are_nan_here_and_in_the_ranks(ranks):
    for tensors in (uninitialized(0, 1), *ranks.run(uninitialized, 2)):
        assert all(torch.isnan(tensor).all() for tensor in tensors)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_lanes_that_a_mask_keeps_out_hold_nan_in_these_tests():
    """Else the tests of the kernels (test_kernels.py), which all run so, could not fail."""
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def double(target, source, PRESENT: tl.constexpr):
        lane = tl.arange(0, 8)
        tl.store(target + lane, 2 * tl.load(source + lane, mask=lane < PRESENT))

    source, target = torch.ones(8), torch.zeros(8)
    with interpreter.undefined_masked_lanes():
        double[(1,)](target, source, PRESENT=5)
    assert torch.equal(target[:5], torch.full((5,), 2.0))
    assert torch.isnan(target[5:]).all()
