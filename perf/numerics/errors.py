"""How far a training step is from float64."""

import torch
from torch import Tensor

from numerics import oracle
from numerics.examples import Example
from numerics.oracle import Result
from numerics.training import MOMENTUM


def per_channel(value: Tensor, example: Example) -> Tensor:
    return value.view(-1, *[1] * (example.input.dim() - 2))


def exact_result(example: Example) -> Result:
    """The float64 oracle, on deviations from each channel's mean, so that it does not cancel."""
    value = example.input.double()
    others = [0, *range(2, value.dim())]
    if value.numel() == value.shape[1]:
        # which torch refuses: x is its own mean, and what there is of y is the bias
        bias = torch.zeros(value.shape[1]) if example.bias is None else example.bias
        output = per_channel(bias.double(), example).expand_as(value)
        mean = MOMENTUM * value.flatten()
        zero = torch.zeros_like(mean)
        return Result(output, zero.view_as(value), running_mean=mean, running_var=zero)
    shift = value.mean(others).to(example.input.dtype).double()
    deviation = value - per_channel(shift, example)
    affine = example.weight, example.bias
    exact = oracle.batch_norm(deviation, example.grad_output, *affine, MOMENTUM, example.eps)
    exact.running_mean += MOMENTUM * shift
    # The oracle's own starts at 1, next to which a small one has no digits.
    exact.running_var = MOMENTUM * deviation.var(others)
    return exact


def statistics(example: Example) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; of equal values the variance is 0."""
    others = [0, *range(2, example.input.dim())]
    value = example.input.double()
    mean = value.mean(others)
    variance = (value - per_channel(mean, example)).square().mean(others)
    return mean, torch.where(value.amax(others) == value.amin(others), 0.0, variance)


def gain(example: Example) -> Tensor:
    """The absolute weight of each channel."""
    ones = torch.ones(example.input.shape[1], dtype=torch.float64)
    return ones if example.weight is None else example.weight.double().abs()


def grad_terms(example: Example) -> Tensor:
    """weight * rstd * dy, the largest term of dx."""
    rstd = (statistics(example)[1] + example.eps).rsqrt()
    return example.grad_output.double() * per_channel(gain(example) * rstd, example)


def scales(example: Example, exact: Result) -> dict[str, float]:
    """What errors are measured against."""
    mean, variance = statistics(example)
    one_deviation = per_channel(gain(example), example).expand_as(example.input)
    return {
        # a channel of one value has y = 0 without a bias: measured against one deviation
        "output": exact.output.norm().item() or one_deviation.norm().item(),
        "grad_input": max(exact.grad_input.norm().item(), grad_terms(example).norm().item()),
        # a mean that is itself small is a sum that cancels, of terms as large as the deviation
        "running_mean": MOMENTUM * torch.maximum(mean.abs(), variance.sqrt()).norm().item(),
        "running_var": exact.running_var.norm().item() or MOMENTUM * example.eps,
    }


def error(name: str, actual: Result, exact: Result, scale: dict[str, float]) -> float:
    """Norm of the difference over the norm of what it is measured against."""
    return oracle.relative_error(getattr(actual, name), getattr(exact, name), scale[name])
