"""Examples of every kind, and how exact a training step on one has to be."""

import random
from typing import Any

import torch
from layers.cases import LAYOUTS
from numerics.errors import error, exact_result, grad_terms, per_channel, scales, statistics
from numerics.examples import Example, make_example
from numerics.training import COMPARED, train_torch

from tests.support.oracle import Result, error_in_ulp

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


def drawn_example(seed: int, most_ranks: int = 5, most_elements: int = 4000) -> Example:
    """Any example: small enough for the interpreter, at every edge of shapes and data."""
    draw = random.Random(seed)
    spatial = draw.choice([(7, 7), (), (1, 1), (5,), (1,), (3, 5), (2, 3, 5)])
    channels = draw.choice([1, 2, 3, 5, 31, 257])
    positions = torch.Size(spatial).numel()
    room = max(most_elements // (channels * positions), 2)
    sizes = [draw.randint(0, 9) for _ in range(draw.randint(1, most_ranks))]
    while sum(sizes) > room:
        sizes = [size // 2 for size in sizes]
    if most_ranks == 1 and sizes[0] * positions == 1:
        sizes = [2]  # a process that is alone must have more than one value per channel
    data: dict[str, Any] = draw.choice(
        [
            {},
            {"mean": 1e2},
            {"mean": 1e4},
            {"mean": -1e6},
            {"mean": 1e3, "std": 1e-6},
            {"std": 1e-6},
            {"std": 1e4},
            {"std": 0.0},
            {"apart": 1e3},
            {"outlier": True},
        ]
    )
    return make_example(
        tuple(sizes),
        channels,
        spatial,
        draw.choice([torch.float32, torch.bfloat16, torch.float16]),
        grad_mean=draw.choice([0.0, 1e3]),
        affine=draw.choice([True, False]),
        seed=seed,
        eps=draw.choice([1e-5, 1e-12, 1e-8, 1e-3, 1e-1]),
        # apart in memory, each channel is a program of the interpreter
        layout=LAYOUTS[channels > 31 or draw.choice([True, False])],
        **data,
    )


def lost(example: Example, name: str = "output") -> float:
    """What the float64 moments cannot hold of a result, relative."""
    mean, variance = statistics(example)
    if name == "running_var":
        spread = torch.where(variance > 0.0, variance, example.eps)
    else:
        spread = variance + example.eps
    square = (mean.square() / spread).max().item()
    return ROUNDINGS_OF_MOMENTS * 2**-53 * square if square > LARGEST_RATIO**2 else 0.0


def faults(example: Example, ours: Result) -> list[str]:
    """Where a result is not as exact as promised: a line each."""
    if example.input.numel() == 0:
        moved = ours.running_mean.any() or ours.running_var.any() or ours.output.numel()
        return ["an empty batch left a trace"] if moved else []
    exact = exact_result(example)
    scale = scales(example, exact)
    single = example.input.numel() == example.input.shape[1]  # torch refuses one value per channel
    theirs = None if single or example.input.dtype != torch.float32 else train_torch(example)
    found = []
    names = COMPARED if example.input.dtype == torch.float32 else COMPARED[2:]
    for name in names:
        limit = lost(example, name) + (NOISE_OF_VARIANCE if name == "running_var" else NOISE)
        if theirs is not None:
            limit = max(limit, error(name, theirs, exact, scale))
        mine = error(name, ours, exact, scale)
        if not mine <= limit:
            found.append(f"{name}: {mine:.2e} is above {limit:.2e}")
    if example.input.dtype != torch.float32:
        found += faults_in_half(example, ours, exact)
    return found


def faults_in_half(example: Example, ours: Result, exact: Result) -> list[str]:
    """Off by more than a unit in the last place of the rounded float64 result, unless the element
    cancels: then by more than 1e-6 of the largest of its terms in the channel.
    """
    others = [0, *range(2, example.input.dim())]
    bias = torch.zeros(example.input.shape[1]) if example.bias is None else example.bias
    offset = per_channel(bias.double(), example)
    terms = torch.maximum((exact.output - offset).abs(), offset.abs())
    found = []
    for name, largest in (("output", terms), ("grad_input", grad_terms(example).abs())):
        actual = getattr(ours, name)
        rounded = getattr(exact, name).to(actual.dtype)
        same = actual == rounded  # and both may be beyond the largest half-precision number
        actual, rounded = (torch.where(same, 0.0, tensor) for tensor in (actual, rounded))
        largest = largest.amax(others, keepdim=True)
        largest = torch.where(largest > 0.0, largest, 1.0)  # equal values, no bias: one deviation
        units = error_in_ulp(actual, rounded.double(), (1e-6 + lost(example)) * largest)
        if not units <= 1.0:
            found.append(f"{name}: {units:.1f} units in the last place")
    return found
