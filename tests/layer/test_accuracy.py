"""Exact on any data: as good as torch's batch norm in float32 and far better where that fails."""

import pathlib

import pytest
import torch

from tests import accuracy
from tests.support import oracle
from triton_syncbn import ops, reference


def assert_exact(case: accuracy.Case, result: oracle.Result) -> None:
    found = accuracy.faults(case, result)
    assert not found, f"{case}: {'; '.join(found)}"


@pytest.mark.parametrize("seed", range(25))
def test_layer_is_exact(seed):
    """The layer in one process, on the interpreted kernels."""
    case = accuracy.drawn_case(seed, most_ranks=1)
    assert_exact(case, accuracy.train_layer(0, 1, case))


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("seed", range(12))
def test_any_split_is_exact(implementation, seed):
    """The four steps for up to five ranks in turn."""
    case = accuracy.drawn_case(seed)
    assert_exact(case, accuracy.train_steps(implementation, case))


@pytest.mark.parametrize("seed", range(50))
def test_larger_tensors_are_exact(seed):
    case = accuracy.drawn_case(seed, most_elements=200_000)
    assert_exact(case, accuracy.train_steps("reference", case))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_split_over_processes_is_exact(ranks, seed):
    """The layer in real processes, so what goes over the wire is tested too."""
    case = accuracy.drawn_case(seed)
    results = ranks.run(accuracy.train_layer, len(case.sizes), case)
    assert_exact(case, accuracy.joined(results))


@pytest.mark.parametrize("name", accuracy.HARD_CASES)
def test_hard_data_over_processes_is_exact(name, reference_ranks):
    case = accuracy.hard_case(name, seed=0)
    results = reference_ranks.run(accuracy.train_layer, len(case.sizes), case)
    assert_exact(case, accuracy.joined(results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 0), (0, 0, 1, 0)], ids=str)
def test_one_value_a_channel_over_all_ranks(sizes, dtype, ranks):
    """y is the bias, dx is 0, and no statistic is infinite."""
    case = accuracy.make_case(sizes, 5, (), dtype, mean=1e4)
    result = accuracy.joined(ranks.run(accuracy.train_layer, len(sizes), case))
    assert torch.equal(result.running_var, torch.zeros(5))
    # the mean in two float32 numbers holds 2**-48 of itself, times 1 / sqrt(1e-5)
    assert result.grad_input.abs().max().item() <= 1e-6 * case.grad_output.abs().max().item()
    assert_exact(case, result)


@pytest.mark.slow
def test_counts_beyond_24_bits():
    """2**24 + 3 values: float32 cannot count them, nor add them up one by one."""
    case = accuracy.make_case((1,), 1, (2**24 + 3,), mean=3.0)
    assert_exact(case, accuracy.train_steps("reference", case))


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
def test_counts_beyond_32_bits(implementation, device):
    """Sums as of 2**33 values: the same results, and a variance that is hardly unbiased."""
    case = accuracy.make_case((3,), 3, (5,), mean=1e2)
    exact = accuracy.exact_result(case)
    scale = accuracy.scale_of(case, exact)
    result = accuracy.train_steps(implementation, case, copies=2**33 / 15)
    for name in ("output", "grad_input"):
        assert accuracy.error(name, result, exact, scale) <= accuracy.NOISE, name
    count = 15
    exact.running_var *= (count - 1) / count * 2**33 / (2**33 - 1)
    for name in ("running_mean", "running_var"):
        assert accuracy.error(name, result, exact, scale) <= accuracy.NOISE, name


def test_large_mean_is_100_times_better_than_torch():
    """At mean / std = 1e4."""
    errors = accuracy.measure("mean / std = 1e4", seeds=2)["output"]
    kernels, plain, theirs = errors
    assert 100 * max(kernels, plain) <= theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in accuracy.HARD_CASES if "2**" not in name])
def test_what_the_table_says_holds(name):
    """ACCURACY.md as committed: ours is at most torch's or noise, and still as good as it says."""
    text = (pathlib.Path(__file__).parents[1] / "ACCURACY.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    first = next(number for number, row in enumerate(rows) if row[1:2] == [name])
    measured = accuracy.measure(name, seeds=1)
    for row, (compared, (*ours, theirs)) in zip(rows[first:], measured.items(), strict=False):
        assert row[2] == accuracy.SHORT.get(compared, compared)
        *claimed, claim_of_torch = (float(cell) for cell in row[3:6])
        assert max(claimed) <= max(claim_of_torch, accuracy.NOISE)
        assert max(ours) <= max(theirs, accuracy.NOISE)
        # one batch is not worse than the worst of several, but for the last roundings
        assert all(
            mine <= max(claim, accuracy.NOISE) for mine, claim in zip(ours, claimed, strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 0, 2, 3, 2)], ids=str)
def test_equal_values_have_no_variance(sizes, implementation):
    """However small eps is next to their mean: what rounding leaves of a variance is not one."""
    case = accuracy.make_case(sizes, 31, std=0.0, eps=1e-12)
    result = accuracy.train_steps(implementation, case)
    assert torch.equal(result.running_var, torch.zeros(31))
    exact = accuracy.exact_result(case)
    scale = accuracy.scale_of(case, exact)
    for name in accuracy.COMPARED:
        assert accuracy.error(name, result, exact, scale) <= accuracy.NOISE, name


@pytest.mark.parametrize("step", [ops.normalize, reference.normalize], ids=["kernel", "reference"])
def test_first_batch_of_an_average_keeps_its_digits(step):
    """With momentum 1, or None and no batch before, the buffer is that of the batch."""
    input = accuracy.make_case(std=1e-6).input
    mean, variance = torch.zeros(4), torch.ones(4)
    counter = torch.tensor(0)
    step(
        *(input, reference.moments(input), None, None),
        running_mean=mean,
        running_var=variance,
        num_batches_tracked=counter,
        momentum=None,
        eps=1e-5,
    )
    expected = input.double().transpose(0, 1).flatten(1).var(1)
    assert oracle.relative_error(variance, expected) <= accuracy.NOISE
