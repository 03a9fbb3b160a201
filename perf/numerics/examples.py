"""Data to train on: a whole batch and how it is split over ranks; normal or hard."""

from typing import Any, NamedTuple

import torch
from layers.cases import laid_out
from torch import Tensor


class Example(NamedTuple):
    """A whole batch and how it is split: rank r holds sizes[r] of the samples."""

    input: Tensor
    grad_output: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sizes: tuple[int, ...]
    eps: float = 1e-5
    layout: str = "channels_first"

    def __repr__(self) -> str:
        size, dtype = tuple(self.input.shape), self.input.dtype
        return f"Example({size}, {dtype}, {self.sizes}, {self.eps=}, {self.layout})"


def make_example(
    sizes: tuple[int, ...] = (8,),
    channels: int = 4,
    spatial: tuple[int, ...] = (7, 7),
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
    apart: float = 0.0,
    outlier: bool = False,
    grad_mean: float = 0.0,
    affine: bool = True,
    seed: int = 0,
    **options: Any,
) -> Example:
    """Normal data. `mean` and `apart`, the step from one rank's mean to the next, are in units of
    std; with std = 0 every channel is constant. An outlier comes first in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(sizes), channels, *spatial)
    values, grads = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    weight, bias = torch.randn((2, channels), generator=generator)
    rank = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    values += mean + apart * rank.view(-1, *[1] * (len(shape) - 1))
    values = values * std if std else torch.full_like(values, 0.7)
    if outlier and values.numel():
        values.view(-1)[0] = 3e4 * max(std, 1e-6)
    values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    maps = values.to(dtype), (grads + grad_mean).to(dtype)
    if not affine:
        return Example(*maps, None, None, sizes, **options)
    return Example(*maps, weight, bias, sizes, **options)


HARD_EXAMPLES: dict[str, dict[str, Any]] = {
    "normal data": {},
    "mean / std = 1e2": {"mean": 1e2},
    "mean / std = 1e4": {"mean": 1e4},
    "mean / std = 1e6": {"mean": 1e6},
    "means of ranks 1000 std apart": {"apart": 1e3},
    "outlier first": {"outlier": True},
    "var << eps": {"std": 1e-6},
    "constant channels": {"std": 0.0},
    "dy with a mean of 1000 std": {"grad_mean": 1e3},
    "2**18 values a channel": {"sizes": (2, 2), "channels": 1, "spatial": (256, 256)},
    "bfloat16": {"dtype": torch.bfloat16},
}


def hard_example(name: str, seed: int) -> Example:
    return make_example(**{"sizes": (5, 0, 3), "seed": seed, **HARD_EXAMPLES[name]})


def parts(example: Example, *tensors: Tensor) -> list[list[Tensor]]:
    """The share of each rank in tensors of the whole batch, dense in the example's layout."""
    ranks = zip(*(tensor.split(example.sizes) for tensor in tensors), strict=True)
    return [[laid_out(tensor, example.layout) for tensor in rank] for rank in ranks]
