"""How far a training step is from float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from numerics import oracle
from numerics.examples import Example
from numerics.oracle import Result
from numerics.training import MOMENTUM

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
