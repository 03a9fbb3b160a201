"""The layers that are compared: shapes of real networks, from shapes.csv."""

import csv
import math
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = pathlib.Path(__file__).parents[1] / "shapes.csv"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
LAYOUTS = ("channels_first", "channels_last")
# For a CPU, where the largest layers would take most of the time and say no more than small ones.
CPU_FACTOR = 4
MOST_VALUES = 1 << 18


class Case(NamedTuple):
    """One layer: the input of one rank, (N, C, *spatial)."""

    suite: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str

    @property
    def bytes(self) -> int:
        """Bytes of the input, T."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def shape_name(self) -> str:
        """Sizes as shapes.csv writes them."""
        return "x".join(map(str, self.shape))

    def without_memory(self) -> Tensor:
        """The input as a tensor on the meta device."""
        return laid_out(
            torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta"), self.layout
        )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor (N, C, *spatial) dense in a layout: itself, or a copy if it is not."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def suites() -> list[str]:
    """Names of the groups of layers in shapes.csv."""
    with SHAPES.open(newline="") as file:
        return list(dict.fromkeys(row["suite"] for row in csv.DictReader(file)))


def scaled_down(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with its spatial sizes divided by CPU_FACTOR and its samples by twice that, none
    below 1; then the largest is halved until no more than MOST_VALUES are left.

    The channels stay. Two samples are left where there is nothing else to take statistics over.
    """
    samples, channels, *spatial = shape
    sizes = [samples // (2 * CPU_FACTOR), *(math.ceil(size / CPU_FACTOR) for size in spatial)]
    sizes[0] = max(2 if math.prod(sizes[1:]) == 1 else 1, sizes[0])
    while channels * math.prod(sizes) > MOST_VALUES:
        largest = sizes.index(max(sizes))
        sizes[largest] = math.ceil(sizes[largest] / 2)
    return (sizes[0], channels, *sizes[1:])


def read_cases(
    chosen: list[str], dtypes: list[str], layouts: list[str], for_cpu: bool = False
) -> list[Case]:
    """The layers of the chosen suites in every dtype and layout, scaled down for a CPU.

    A layer without spatial dimensions has one layout and is listed under the first.
    """
    with SHAPES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] in chosen]
    cases = []
    for row in rows:
        shape = tuple(int(size) for size in row["shape"].split("x"))
        if for_cpu:
            shape = scaled_down(shape)
        for dtype in dtypes:
            for layout in layouts if len(shape) > 2 else layouts[:1]:
                cases.append(Case(row["suite"], row["name"], shape, dtype, layout))
    return cases
