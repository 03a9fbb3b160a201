"""How a kernel is launched: tile, programs, warps. It changes speed and nothing else."""

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
MOST_PROGRAMS = 65535  # of the second axis of a grid
VECTORS_OF_THREAD = 4  # 16-byte loads in flight in each thread, of all the tensors it reads
THREADS = 128
MULTIPROCESSORS_OF_INTERPRETER = 4  # enough to split reductions, few enough to run in Python
# From here on offsets do not fit 32 bits; the margin is the end of the last block.
WIDE_FROM = 2**31 - 2**16


class LaunchConfig(NamedTuple):
    """block_rows x block_columns elements a tile; `programs` share a channel; warps of a program.

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
    """A config that is good on any GPU, from sizes and the number of multiprocessors.

    kernel: "moments", "grad_moments", "normalize" or "grad_input".
    """
    tensors_read = 2 if kernel in ("grad_moments", "grad_input") else 1
    block = THREADS * max(shape.vector, 4) * VECTORS_OF_THREAD // tensors_read
    if shape.channels_last or kernel in ("moments", "grad_moments"):
        return _tiles(shape, block, multiprocessors(device))
    # Few threads and large blocks, as each block computes the coefficients of its channels anew;
    # but not larger than a row, so that a block meets two channels at most, and not fewer than
    # two a multiprocessor.
    elements = shape.values * shape.channels
    while block > 1024 and (
        1024 <= shape.columns < block or elements < 2 * block * multiprocessors(device)
    ):
        block //= 2
    return LaunchConfig(1, block, 1, THREADS // 32)


def _tiles(shape: Geometry, elements: int, multiprocessors: int) -> LaunchConfig:
    """Tiles of so many elements, and programs that keep all multiprocessors busy."""
    if shape.channels_last:
        block_columns = min(triton.next_power_of_2(shape.channels), 64)
    else:
        slack = shape.vector - 1 if shape.columns % shape.vector else 0
        longest = max(shape.columns + slack, shape.vector)
        block_columns = min(triton.next_power_of_2(longest), elements)
    block_rows = min(elements // block_columns, triton.next_power_of_2(max(shape.rows, 1)))
    config = LaunchConfig(block_rows, block_columns, 1, THREADS // 32)
    tiles = count_tiles(shape, block_rows, block_columns)
    wanted = triton.cdiv(4 * multiprocessors, reduction_blocks(shape, config))
    programs = min(max(wanted, triton.cdiv(tiles, LONGEST_CHAIN)), tiles, MOST_PROGRAMS)
    return config._replace(programs=max(programs, 1))


def reduction_blocks(shape: Geometry, config: LaunchConfig) -> int:
    """Channels, or blocks of channels, that are reduced apart from each other."""
    if shape.channels_last:
        return triton.cdiv(shape.channels, config.block_columns)
    if config.block_rows > 1 and count_tiles(shape, config.block_rows, config.block_columns) > (
        triton.cdiv(shape.rows, config.block_rows)
    ):
        raise ValueError(
            f"config: expected block_columns that hold a row of {shape.columns} where block_rows "
            f"is above 1, got {config}"
        )
    return shape.channels


def output_grid(shape: Geometry, config: LaunchConfig) -> tuple[int, int, int, tl.dtype]:
    """How a map is written: programs, rows that a flat block can touch, 2**32 / columns rounded up,
    and the dtype of offsets.

    Channels-last maps are written in tiles, channels-first maps in blocks of consecutive elements.
    """
    if shape.channels_last:
        programs = triton.cdiv(shape.channels, config.block_columns) * config.programs
        return programs, 1, 0, tl.int64
    elements = shape.values * shape.channels
    columns = max(shape.columns, 2)
    span_rows = triton.next_power_of_2(triton.cdiv(config.block_columns, columns) + 1)
    index = tl.int64 if elements >= WIDE_FROM else tl.int32
    programs = triton.cdiv(elements, config.block_columns)
    return programs, span_rows, triton.cdiv(2**32, columns), index
