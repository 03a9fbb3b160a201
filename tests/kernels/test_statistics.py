"""The arithmetic that statistics go through in the kernels, against 80-bit numbers."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
statistics = pytest.importorskip("triton_syncbn.kernels.statistics")

SIZE = 2048


@triton.jit
def inverse_roots(results, values, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(results + lane, statistics.inverse_root(tl.load(values + lane)))


@triton.jit
def inverses(results, counts, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(results + lane, statistics.inverse(tl.load(counts + lane)))


def apply(kernel, values: np.ndarray, device: torch.device) -> np.ndarray:
    results = torch.empty(SIZE, dtype=torch.float64, device=device)
    kernel[(1,)](results, torch.from_numpy(values).to(device), SIZE)
    return results.cpu().numpy()


def roundings(results: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, relative, in units of a rounding of float64."""
    return float(np.abs(results / exact - 1).max() * 2**53)


def test_inverse_root_over_the_range_of_float64(device):
    rng = np.random.default_rng(0)
    values = np.concatenate([10 ** rng.uniform(-307, 308, SIZE // 2), rng.uniform(1, 4, SIZE // 2)])
    results = apply(inverse_roots, values, device)
    # two in the last step, one of them of a sum near 1.5, and two more without fused multiply-adds
    assert roundings(results, 1 / np.sqrt(values.astype(np.longdouble))) <= 4


def test_inverse_root_of_what_is_no_variance(device):
    values = np.ones(SIZE)
    values[:2] = 0.0, np.nan
    results = apply(inverse_roots, values, device)
    assert results[0] == np.inf
    assert np.isnan(results[1])
    assert roundings(results[2:], np.ones(SIZE - 2)) <= 4


def test_inverse_of_counts(device):
    rng = np.random.default_rng(0)
    large = np.rint(10 ** rng.uniform(3, 15, SIZE // 2))
    counts = np.concatenate([np.arange(1.0, SIZE // 2 + 1), large])
    results = apply(inverses, counts, device)
    assert roundings(results, 1 / counts.astype(np.longdouble)) <= 3
    powers = 2.0 ** (np.arange(SIZE) % 50)
    assert (apply(inverses, powers, device) == 1 / powers).all()
