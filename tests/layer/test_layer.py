"""The layer in real processes: any split of the samples gives the result of one big batch."""

import pytest
import torch

from tests.support import oracle
from tests.support.batches import (
    CHANNELS,
    HARD,
    SPATIAL,
    SPLITS,
    Batch,
    assert_exact_in_float32,
    assert_exact_in_half,
    exact_result,
    joined,
    large_mean,
    make_batch,
    outlier_first,
    train_one_step,
)


def run(ranks, batch: Batch) -> tuple[oracle.Result, oracle.Result]:
    results = ranks.run(train_one_step, len(batch.sizes), batch)
    for result, size in zip(results, batch.sizes, strict=True):
        assert result.output.shape == result.grad_input.shape == (size, *batch.input.shape[1:])
        assert result.output.dtype == result.grad_input.dtype == batch.input.dtype
    return joined(results), exact_result(batch)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_is_one_big_batch(sizes, ranks):
    actual, exact = run(ranks, make_batch(sizes))
    assert_exact_in_float32(actual, exact)
    assert actual.num_batches_tracked.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(6, 1), (4, 0, 2)], ids=["uneven", "empty"])
def test_any_split_is_one_big_batch_in_half_precision(sizes, dtype, ranks):
    batch = make_batch(sizes, dtype)
    assert_exact_in_half(*run(ranks, batch), batch.weight, batch.bias)


@pytest.mark.parametrize("spatial", [(), (9,), (3, 4, 5)], ids=["2-D", "3-D", "5-D"])
def test_any_rank_of_input(spatial, ranks):
    assert_exact_in_float32(*run(ranks, make_batch((5, 4), spatial=spatial)))


def test_ranks_may_differ_in_layout(ranks):
    batch = make_batch((3, 2, 3), layouts=("channels_first", "channels_last"))
    assert_exact_in_float32(*run(ranks, batch))


def test_one_value_a_channel_a_rank(ranks):
    assert_exact_in_float32(*run(ranks, make_batch((1, 1, 1), spatial=())))


def test_float64(ranks):
    batch = make_batch((3, 1), torch.float64)
    actual, exact = run(ranks, batch)
    for name in ("output", "grad_input"):
        assert oracle.relative_error(getattr(actual, name), getattr(exact, name)) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_when_all_ranks_are_empty_nothing_is_updated(dtype, ranks):
    for result in ranks.run(train_one_step, 2, make_batch((0, 0), dtype)):
        assert result.output.shape == result.grad_input.shape == (0, CHANNELS, *SPATIAL)
        assert torch.equal(result.running_mean, torch.zeros(CHANNELS))
        assert torch.equal(result.running_var, torch.ones(CHANNELS))
        assert result.num_batches_tracked.item() == 0
        assert torch.equal(result.grad_weight, torch.zeros(CHANNELS))
        assert torch.equal(result.grad_bias, torch.zeros(CHANNELS))


@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
@pytest.mark.parametrize("sizes", [(5,), (4, 3)], ids=["one rank", "two ranks"])
def test_hard_data_in_float32(make, sizes, ranks):
    assert_exact_in_float32(*run(ranks, make(sizes, torch.float32)))


@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_hard_data_in_bfloat16(make, ranks):
    batch = make((4, 3), torch.bfloat16)
    assert_exact_in_half(*run(ranks, batch), batch.weight, batch.bias)


def test_an_outlier_does_not_harm_the_others(ranks):
    """The norm of y is the outlier's, so look at the other values of its channel alone."""
    actual, exact = run(ranks, outlier_first((4, 3), torch.float32))
    others = actual.output[1:, 0], exact.output[1:, 0]
    assert oracle.relative_error(*others) <= 2e-6


def test_large_mean_is_far_better_than_torch(ranks):
    """At mean / std = 1e4 torch's float32 batch norm has lost the digits that are kept here."""
    batch = large_mean((4, 3), torch.float32)
    actual, exact = run(ranks, batch)
    theirs = torch.nn.functional.batch_norm(batch.input, None, None, batch.weight, batch.bias, True)
    error = oracle.relative_error(actual.output, exact.output)
    assert error <= oracle.relative_error(theirs, exact.output) / 10
