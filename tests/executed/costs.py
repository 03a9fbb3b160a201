"""The layers of perf/shapes.csv, scaled down: what their kernels execute and move."""

import csv
import math
import pathlib
from typing import NamedTuple

import torch
from executor.trace import SECTOR, bank_conflicts, sectors

from .variants import Variant, run

SHAPES = pathlib.Path(__file__).parents[2] / "perf" / "shapes.csv"
MAPS = ("input", "output", "grad_output", "grad_input")  # parameters of the kernels
MOST_ELEMENTS = 1 << 17  # of a layer as scaled down, if its channels let it
ELEMENTS_OF_VECTOR = 8  # N * C keeps this factor, so that rows are read as vectors of 8 elements


class Cost(NamedTuple):
    """Of one launch. sectors: taken, over the least for its requests; and over those of the tensors
    that it must read or write once.
    """

    kernel: str
    layer: str
    layout: str
    instructions: float  # by a thread, for each element
    of_requests: float
    of_bytes: float
    conflicts: float  # passes over the banks, over the least


def scaled_down(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """A layer with the same rows in memory, and fewer of them: channels last, (N * S, C)."""
    samples, channels, *spatial = shape
    if layout == "channels_first":
        while samples * channels > ELEMENTS_OF_VECTOR and (
            samples * channels * math.prod(spatial) > MOST_ELEMENTS
        ):
            if samples > 1:
                samples //= 2
            elif channels % 2 == 0:
                channels //= 2
            else:
                break
        return (samples, channels, *spatial)
    positions = max(1, min(samples * math.prod(spatial), MOST_ELEMENTS // channels))
    return (positions, channels)


def layers() -> dict[str, tuple[int, ...]]:
    """The layers, by name."""
    with SHAPES.open(newline="") as file:
        return {
            row["name"]: tuple(map(int, row["shape"].split("x"))) for row in csv.DictReader(file)
        }


def costs_of_layer(layer: str, layout: str, capability: int) -> list[Cost]:
    """A line for each kernel of a layer in bfloat16; none where a layer has no such layout."""
    shape = layers()[layer]
    if layout == "channels_first" and math.prod(shape[2:]) == 1:
        return []
    small = scaled_down(shape, layout)
    dtype = torch.bfloat16
    _, launches = run(Variant(small, dtype), capability)
    size = math.prod(small) * dtype.itemsize
    costs = []
    for launch in launches:
        maps = [region for region in launch.machine.memory.regions if region.name in MAPS]
        moved = [sectors(region) for region in maps]
        taken = sum(transactions.taken for transactions in moved)
        shared = bank_conflicts(launch.machine.shared)
        costs.append(
            Cost(
                launch.kernel.name.removesuffix("_kernel"),
                layer,
                layout,
                launch.machine.executed.sum() / math.prod(small),
                taken / sum(transactions.least for transactions in moved),
                taken / (len(moved) * size / SECTOR),
                shared.taken / shared.least if shared.least else 1.0,
            )
        )
    return costs
