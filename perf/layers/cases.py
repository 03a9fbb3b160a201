"""The layers that are compared: shapes of real networks, from shapes.csv, and the block that each
is in.
"""

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


# What a pass of a block cannot do without: so many times the bytes of its input, and so many gates
# of one bit an element. Forward reads x for the statistics, reads it again and writes y; backward
# reads x and dy twice and writes dx. A residual is read once, and its gradient is written once; the
# gates of ReLU tell its derivative there.
BLOCKS = {
    "none": {"forward": (3, 0), "backward": (5, 0), "both": (8, 0)},
    "relu": {"forward": (3, 0), "backward": (5, 0), "both": (8, 0)},
    "add_relu": {"forward": (4, 1), "backward": (6, 2), "both": (10, 3)},
}
PASSES = ("forward", "backward", "both")


class Case(NamedTuple):
    """One layer: the input of one rank, (N, C, *spatial)."""

    suite: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    block: str = "none"

    @property
    def bytes(self) -> int:
        """Bytes of the input, T."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def bytes_of_pass(self, pass_name: str) -> float:
        """Bytes that a pass cannot do without."""
        maps, gates = BLOCKS[self.block][pass_name]
        return maps * self.bytes + gates / 8 * math.prod(self.shape)

    @property
    def shape_name(self) -> str:
        """Sizes as shapes.csv writes them."""
        return "x".join(map(str, self.shape))

    def without_memory(self) -> Tensor:
        """The input as a tensor on the meta device."""
        input = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        return laid_out(input, self.layout)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor (N, C, *spatial) dense in a layout: itself, or a copy if it is not."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def _rows() -> list[dict[str, str]]:
    with SHAPES.open(newline="") as file:
        return list(csv.DictReader(file))


def suites() -> list[str]:
    """Names of the groups of layers in shapes.csv."""
    return list(dict.fromkeys(row["suite"] for row in _rows()))


def read_cases(
    chosen: list[str],
    dtypes: list[str],
    layouts: list[str],
    on_cpu: bool = False,
    block: str = "none",
) -> list[Case]:
    """The layers of the chosen suites in every dtype and layout; for a CPU those of them that say
    something of their own there, with less in a batch.

    A layer without spatial dimensions has one layout and is listed under the first.
    """
    cases = []
    for row in _rows():
        sizes = row["on_cpu" if on_cpu else "shape"]
        if row["suite"] not in chosen or not sizes:
            continue
        shape = tuple(map(int, sizes.split("x")))
        cases += [
            Case(row["suite"], row["name"], shape, dtype, layout, block)
            for dtype in dtypes
            for layout in (layouts if len(shape) > 2 else layouts[:1])
        ]
    return cases
