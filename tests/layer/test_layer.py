"""The layer in real processes: any split of the samples gives the result of one big batch."""

from typing import NamedTuple

import pytest
import torch

from tests import oracle
from triton_syncbn import SyncBN

CHANNELS = 5
SPATIAL = (6, 7)


class Batch(NamedTuple):
    """A whole batch and how it is split: rank r holds sizes[r] of the samples."""

    input: torch.Tensor
    grad_output: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    sizes: tuple[int, ...]
    layouts: tuple[str, ...] = ("channels_first",)
    eps: float = 1e-5


def make_batch(sizes, dtype=torch.float32, spatial=SPATIAL, seed=0, **options) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(sizes), CHANNELS, *spatial)
    values, grads = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    parameters = torch.randn((2, CHANNELS), generator=generator)
    return Batch(values.to(dtype), grads.to(dtype), *parameters, tuple(sizes), **options)


def train_one_step(rank: int, world_size: int, batch: Batch) -> oracle.Result:
    """What a rank gets from its part of the batch."""
    part = [tensor.split(batch.sizes)[rank] for tensor in (batch.input, batch.grad_output)]
    if batch.layouts[rank % len(batch.layouts)] == "channels_last":
        part = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in part]
    input, grad_output = part
    input = input.clone().requires_grad_()
    layer = SyncBN(CHANNELS, eps=batch.eps)
    with torch.no_grad():
        layer.weight.copy_(batch.weight)
        layer.bias.copy_(batch.bias)
    output = layer(input)
    output.backward(grad_output)
    return oracle.Result(
        output.detach(),
        input.grad,
        layer.weight.grad,
        layer.bias.grad,
        layer.running_mean,
        layer.running_var,
        layer.num_batches_tracked,
    )


def joined(results: list[oracle.Result]) -> oracle.Result:
    """The ranks' results as that of one process: maps side by side, parameter gradients summed.

    Asserts that all ranks hold the same statistics, to the last bit.
    """
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for result in results[1:]:
            assert torch.equal(getattr(result, name), getattr(results[0], name)), name
    return oracle.Result(
        torch.cat([result.output for result in results]),
        torch.cat([result.grad_input for result in results]),
        torch.stack([result.grad_weight for result in results]).sum(0),
        torch.stack([result.grad_bias for result in results]).sum(0),
        results[0].running_mean,
        results[0].running_var,
        results[0].num_batches_tracked,
    )


def exact_result(batch: Batch) -> oracle.Result:
    return oracle.batch_norm(
        batch.input, batch.grad_output, batch.weight, batch.bias, eps=batch.eps
    )


def run(ranks, batch: Batch) -> tuple[oracle.Result, oracle.Result]:
    results = ranks.run(train_one_step, len(batch.sizes), batch)
    for result, size in zip(results, batch.sizes, strict=True):
        assert result.output.shape == result.grad_input.shape == (size, *batch.input.shape[1:])
        assert result.output.dtype == result.grad_input.dtype == batch.input.dtype
    return joined(results), exact_result(batch)


def assert_exact_in_float32(actual: oracle.Result, exact: oracle.Result) -> None:
    """A few roundings of float32, 6e-8 each; in backward those of sums whose terms cancel."""
    for name, limit in (
        ("output", 2e-6),
        ("running_mean", 2e-6),
        ("running_var", 2e-6),
        ("grad_input", 5e-6),
        ("grad_weight", 5e-6),
        ("grad_bias", 5e-6),
    ):
        error = oracle.relative_error(getattr(actual, name), getattr(exact, name))
        assert error <= limit, f"{name}: {error:.2e}"


def assert_exact_in_half(actual: oracle.Result, exact: oracle.Result, weight, bias) -> None:
    """Rounded once from a float32 result: half a unit in the last place, and little more.

    The rounding of that float32 result may show where y cancels against its terms, (x - mean) *
    rstd * weight and bias. There y is held to 1e-6 of those terms.
    """
    per_channel = (1, -1, *[1] * (exact.output.dim() - 2))
    offset = bias.double().view(per_channel)
    terms = (exact.output - offset).abs().amax((0, *range(2, exact.output.dim())), keepdim=True)
    scale = torch.maximum(terms, offset.abs()).expand_as(exact.output)
    cancelled = exact.output.abs() < 1e-3 * scale
    negligible = torch.where(cancelled, 1e-6 * scale, 0.0)
    assert oracle.error_in_ulp(actual.output, exact.output, negligible) <= 0.55
    largest = exact.grad_input.abs().max()
    assert oracle.error_in_ulp(actual.grad_input, exact.grad_input, 1e-6 * largest) <= 1.0
    for name in ("running_mean", "running_var"):
        assert oracle.relative_error(getattr(actual, name), getattr(exact, name)) <= 2e-6


SPLITS = {
    "one rank": (5,),
    "even": (3, 3),
    "uneven": (6, 1),
    "three": (1, 3, 2),
    "empty": (4, 0, 2),
    "four": (5, 3, 0, 0),
    "single": (1, 1, 1, 1),
}


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


def large_mean(sizes, dtype):
    batch = make_batch(sizes, torch.float64)
    return batch._replace(
        input=(batch.input + 1e4).to(dtype), grad_output=batch.grad_output.to(dtype)
    )


def means_apart(sizes, dtype):
    """Means of the ranks that differ by 1000 standard deviations."""
    batch = make_batch(sizes, torch.float64)
    offsets = torch.cat([torch.full((size,), 1e3 * rank) for rank, size in enumerate(sizes)])
    values = batch.input + offsets.view(-1, 1, 1, 1)
    return batch._replace(input=values.to(dtype), grad_output=batch.grad_output.to(dtype))


def outlier_first(sizes, dtype):
    batch = make_batch(sizes, dtype)
    batch.input.view(-1)[0] = 3e4
    return batch


def tiny_variance(sizes, dtype):
    """A variance of 1e-12, far below eps."""
    batch = make_batch(sizes, torch.float64)
    return batch._replace(
        input=(batch.input * 1e-6).to(dtype), grad_output=batch.grad_output.to(dtype)
    )


def constant_channels(sizes, dtype):
    batch = make_batch(sizes, dtype)
    batch.input[:, 1:3] = 0.7
    return batch


HARD = [large_mean, means_apart, outlier_first, tiny_variance, constant_channels]


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
