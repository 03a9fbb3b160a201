"""What is right, float64 batch normalization of the whole batch, and the distance to it."""

import math

import torch
from numerics.oracle import Result, batch_norm, relative_error
from torch import Tensor

__all__ = ["Result", "batch_norm", "error_in_ulp", "relative_error"]


def error_in_ulp(actual: Tensor, expected: Tensor, negligible: Tensor | float = 0.0) -> float:
    """Largest distance in units in the last place that actual's dtype has at the expected value.

    expected: float64. An element that is off by no more than `negligible` counts as right.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    info = torch.finfo(actual.dtype)
    unit = expected.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps
    difference = (actual.double() - expected).abs()
    difference = torch.where(difference <= negligible, 0.0, difference)
    largest = (difference / unit).max().item()
    return math.inf if math.isnan(largest) else largest
