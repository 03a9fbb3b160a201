"""The layers that are compared: shapes of real networks, from shapes.csv."""

import csv
import math
import pathlib
from typing import NamedTuple

import torch

SHAPES = pathlib.Path(__file__).with_name("shapes.csv")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
LAYOUTS = ("channels_first", "channels_last")


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


def suites() -> list[str]:
    """Names of the groups of layers in shapes.csv."""
    with SHAPES.open(newline="") as file:
        return list(dict.fromkeys(row["suite"] for row in csv.DictReader(file)))


def scaled_down(shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """A shape with its spatial sizes divided by `factor` and its samples by twice that, none below
    1.

    The channels stay. Two samples are left where there is nothing else to take statistics over.
    """
    samples, channels, *spatial = shape
    spatial = [max(1, math.ceil(size / factor)) for size in spatial]
    least = 2 if math.prod(spatial) == 1 else 1
    return (max(least, samples // (2 * factor)), channels, *spatial)


def read_cases(
    chosen: list[str], dtypes: list[str], layouts: list[str], factor: int = 1
) -> list[Case]:
    """The layers of the chosen suites in every dtype and layout, scaled down by `factor`.

    A layer without spatial dimensions has one layout and is listed under the first.
    """
    with SHAPES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] in chosen]
    cases = []
    for row in rows:
        shape = tuple(int(size) for size in row["shape"].split("x"))
        if factor > 1:
            shape = scaled_down(shape, factor)
        for dtype in dtypes:
            for layout in layouts if len(shape) > 2 else layouts[:1]:
                cases.append(Case(row["suite"], row["name"], shape, dtype, layout))
    return cases
