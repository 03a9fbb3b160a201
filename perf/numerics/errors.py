"""How far a training step is from float64, and how far it may be."""

from typing import NamedTuple

import torch
from torch import Tensor

from numerics import oracle
from numerics.examples import Example
from numerics.oracle import Result
from numerics.training import COMPARED, MOMENTUM, train_torch

# Two implementations that are both this good differ in how their last roundings fall: 6e-8 is the
# rounding of one float32 operation, and a result has three or so.
NOISE = 2e-7
# A variance that one value makes, an outlier, has five: two of its deviation, which is squared, and
# one each of the square, of the sum and of the buffer.
NOISE_OF_VARIANCE = 3e-7
# Sums of squares are sent as float64, so mean**2 * 2**-53 is lost of var + eps, a few times over.
# Up to this ratio of mean and sqrt(var + eps) that is below 2e-7.
LARGEST_RATIO = 1.1e4
ROUNDINGS_OF_MOMENTS = 8  # of float64, in the sums of ranks, the mean, its square and the quotients


def per_channel(value: Tensor, example: Example) -> Tensor:
    return value.view(-1, *[1] * (example.input.dim() - 2))


def exact_result(example: Example) -> Result:
    """The float64 oracle, on deviations from each channel's mean, so that it does not cancel."""
    channels, count = example.input.shape[1], example.input.numel() // example.input.shape[1]
    zeros = torch.zeros(channels, dtype=torch.float64)
    if count == 0:
        none = example.input.double()
        return Result(none, none, running_mean=zeros, running_var=zeros)
    if count == 1:  # which torch refuses: x is its own mean, and what there is of y is the bias
        bias = zeros if example.bias is None else example.bias.double()
        output = per_channel(bias, example).expand_as(example.input)
        mean = MOMENTUM * example.input.double().view(channels)
        return Result(output, torch.zeros_like(output), running_mean=mean, running_var=zeros)
    value = example.input.double()
    shift = value.mean([0, *range(2, value.dim())]).to(example.input.dtype).double()
    exact = oracle.batch_norm(
        value - per_channel(shift, example),
        example.grad_output,
        example.weight,
        example.bias,
        MOMENTUM,
        example.eps,
    )
    exact.running_mean += MOMENTUM * shift
    # The oracle's own starts at 1, next to which a small one has no digits.
    deviation = value - per_channel(shift, example)
    exact.running_var = MOMENTUM * deviation.var([0, *range(2, value.dim())])
    return exact


class Scale(NamedTuple):
    """What errors are measured against, and what the float64 moments cannot hold of it."""

    norms: dict[str, float]
    grad_terms: Tensor  # weight * rstd * dy, the largest term of dx
    lost: float  # relative, of y and dx
    lost_of_variance: float


def scale_of(example: Example, exact: Result) -> Scale:
    others = [0, *range(2, example.input.dim())]
    value = example.input.double()
    mean = value.mean(others)
    variance = (value - per_channel(mean, example)).square().mean(others)
    variance = torch.where(value.amax(others) == value.amin(others), 0.0, variance)
    gain = torch.ones_like(mean) if example.weight is None else example.weight.double().abs()
    grad_terms = example.grad_output.double() * per_channel(
        gain * (variance + example.eps).rsqrt(), example
    )

    def lost(spread: Tensor) -> float:
        square = (mean.square() / spread).max().item()
        return ROUNDINGS_OF_MOMENTS * 2**-53 * square if square > LARGEST_RATIO**2 else 0.0

    norms = {
        # a channel of one value has y = 0 without a bias: measured against one deviation
        "output": exact.output.norm().item()
        or per_channel(gain, example).expand_as(value).norm().item(),
        "grad_input": max(exact.grad_input.norm().item(), grad_terms.norm().item()),
        # a mean that is itself small is a sum that cancels, of terms as large as the deviation
        "running_mean": MOMENTUM * torch.maximum(mean.abs(), variance.sqrt()).norm().item(),
        "running_var": exact.running_var.norm().item() or MOMENTUM * example.eps,
    }
    return Scale(
        norms,
        grad_terms,
        lost(variance + example.eps),
        lost(torch.where(variance > 0.0, variance, example.eps)),
    )


def error(name: str, actual: Result, exact: Result, scale: Scale) -> float:
    """Norm of the difference over the norm of what it is measured against."""
    difference = getattr(actual, name).double() - getattr(exact, name)
    return difference.norm().item() / max(scale.norms[name], 1e-300)


def faults(example: Example, ours: Result) -> list[str]:
    """Where a result is not as exact as promised: a line each."""
    if example.input.numel() == 0:
        moved = ours.running_mean.any() or ours.running_var.any() or ours.output.numel()
        return ["an empty batch left a trace"] if moved else []
    exact = exact_result(example)
    scale = scale_of(example, exact)
    single = example.input.numel() == example.input.shape[1]  # torch refuses one value a channel
    theirs = None if single or example.input.dtype != torch.float32 else train_torch(example)
    found = []
    names = COMPARED if example.input.dtype == torch.float32 else COMPARED[2:]
    for name in names:
        limit = NOISE + scale.lost
        if name == "running_var":
            limit = NOISE_OF_VARIANCE + scale.lost_of_variance
        if theirs is not None:
            limit = max(limit, error(name, theirs, exact, scale))
        mine = error(name, ours, exact, scale)
        if not mine <= limit:
            found.append(f"{name}: {mine:.2e} is above {limit:.2e}")
    if example.input.dtype != torch.float32:
        found += faults_in_half(example, ours, exact, scale)
    return found


def faults_in_half(example: Example, ours: Result, exact: Result, scale: Scale) -> list[str]:
    """Off by more than a unit in the last place of the rounded float64 result, unless the element
    cancels: then by more than 1e-6 of the largest of its terms in the channel.
    """
    others = [0, *range(2, example.input.dim())]
    bias = torch.zeros(example.input.shape[1]) if example.bias is None else example.bias
    offset = per_channel(bias.double(), example)
    terms = torch.maximum((exact.output - offset).abs(), offset.abs())
    found = []
    for name, largest in (("output", terms), ("grad_input", scale.grad_terms.abs())):
        actual = getattr(ours, name)
        rounded = getattr(exact, name).to(actual.dtype)
        same = actual == rounded  # and both may be beyond the largest half-precision number
        actual, rounded = (torch.where(same, 0.0, tensor) for tensor in (actual, rounded))
        largest = largest.amax(others, keepdim=True)
        largest = torch.where(largest > 0.0, largest, 1.0)  # equal values, no bias: one deviation
        units = oracle.error_in_ulp(actual, rounded.double(), (1e-6 + scale.lost) * largest)
        if not units <= 1.0:
            found.append(f"{name}: {units:.1f} units in the last place")
    return found
