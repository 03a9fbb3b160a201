"""Whole batches split over ranks, a training step on them, and how exact its result must be."""

from typing import NamedTuple

import torch

from tests.support import oracle
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
