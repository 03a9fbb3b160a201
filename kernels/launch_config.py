"""How a kernel is launched: tile, number of programs, warps. A config changes the speed of a
result, never its meaning.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .indexing import Geometry, count_tiles

# Values that one float32 lane adds up in a row. It bounds the rounding of a lane to 64/4 units in
# the last place even for data whose roundings do not average out (masks, one-hot inputs), and the
# harm of an outlier in the first tile.
LONGEST_CHAIN = 64
MULTIPROCESSORS_OF_INTERPRETER = (
    4  # enough to split every reduction, little enough to run it in Python
)
MOST_PROGRAMS = 65535  # of the second axis of a grid


class LaunchConfig(NamedTuple):
    """block_rows x block_columns elements a tile, `programs` programs that share a channel's tiles,
    warps a program.

    The two kernels that write a map the size of the input walk channels-first memory flat, in
    blocks of block_columns elements; there block_rows is 1 and `programs` is not used.
    """

    block_rows: int
    block_columns: int
    programs: int
    num_warps: int


def compute_dtype(tensor: torch.Tensor) -> tl.dtype:
    """The dtype a kernel computes in: float64 for float64 input, else float32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter, a small number."""
    if device.type == "cpu":
        return MULTIPROCESSORS_OF_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def default_config(kernel: str, shape: Geometry, device: torch.device) -> LaunchConfig:
    """A config that is good on any GPU, from the sizes of the tensor and the number of
    multiprocessors.

    kernel: "moments", "grad_moments", "normalize" or "grad_input".
    """
    reads_two = kernel in ("grad_moments", "grad_input")
    elements = (
        2048 if reads_two else 4096
    )  # of a tile: 8 or 16 values a thread and tensor, several loads in flight
    elements //= max(1, 8 // max(shape.vector, 4))  # float64 takes twice the registers
    if shape.channels_last:
        block_columns = min(triton.next_power_of_2(shape.channels), 64)
        block_rows = min(elements // block_columns, triton.next_power_of_2(max(shape.rows, 1)))
        blocks = triton.cdiv(shape.channels, block_columns)
    elif kernel in ("normalize", "grad_input"):
        return LaunchConfig(1, 1024, 1, 4)
    else:
        slack = shape.vector - 1 if shape.columns % shape.vector else 0
        block_columns = min(
            triton.next_power_of_2(max(shape.columns + slack, shape.vector, 1)), elements
        )
        block_rows = min(elements // block_columns, triton.next_power_of_2(max(shape.rows, 1)))
        blocks = shape.channels
    tiles = count_tiles(shape, block_rows, block_columns)
    wanted = triton.cdiv(4 * multiprocessors(device), blocks)
    programs = max(1, min(max(wanted, triton.cdiv(tiles, LONGEST_CHAIN)), tiles, MOST_PROGRAMS))
    return LaunchConfig(block_rows, block_columns, programs, 4)


def output_grid(shape: Geometry, config: LaunchConfig) -> tuple[int, int, int]:
    """Programs of a kernel that writes a map, the rows its block can touch, and ceil(2**32 /
    columns).

    Channels-last maps are written in tiles, channels-first maps in blocks of consecutive elements.
    """
    if shape.channels_last:
        return triton.cdiv(shape.channels, config.block_columns) * config.programs, 1, 0
    elements = shape.values * shape.channels
    columns = max(shape.columns, 2)
    span_rows = triton.next_power_of_2(triton.cdiv(config.block_columns, columns) + 1)
    return triton.cdiv(elements, config.block_columns), span_rows, triton.cdiv(2**32, columns)
