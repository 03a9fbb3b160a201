"""How a kernel is launched: tile, programs, warps. It changes speed and nothing else."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .indexing import Geometry, Tiling, count_tiles, span_of_row

REDUCTIONS = ("moments", "grad_moments")
WRITERS = ("normalize", "grad_input")
# Values that one float32 lane adds up in a row. It bounds the rounding of a lane to 64/4 units in
# the last place even for data whose roundings do not average out (masks, one-hot inputs), and the
# harm of an outlier in the first tile.
LONGEST_CHAIN = 64
MOST_SPLITS = 65535
VECTORS_OF_THREAD = 4  # 16-byte loads in flight in each thread, of all the tensors it reads
WARPS_OF_PROGRAM = 4
RESIDENT_WARPS = 16  # of 128 registers per thread: so many fit a multiprocessor of any GPU
RESIDENT_SMALL_WARPS = 24  # of 80 registers per thread
RESIDENT_WRITING_WARPS = 32  # of 64 registers per thread
# Of a tile, in channels last. A reduction takes few, as programs that share a channel leave partial
# sums; a writer as many as leave it no more than a quarter of its lanes without a channel.
CHANNELS_OF_REDUCTION = 32
CHANNELS_OF_WRITER = (128, 64, 32)
TILES_OF_OVERHEAD = 2  # what a program costs beside its tiles
MOST_WAVES = 8
MOST_ROWS_OF_WARP = 64  # that a flat block touches: their coefficients are held in registers
MULTIPROCESSORS_OF_INTERPRETER = 4  # enough to split reductions, few enough to run in Python
# Elements from which on offsets are 64-bit, which takes twice the instructions. A program asks for
# one tile more than it has, which may lie as far past the end as the end is far.
WIDE_FROM = 2**30


class LaunchConfig(NamedTuple):
    """A tile of block_rows x block_columns elements, how the work is split, and the warps of a
    program.

    A channel, or a block of channels, is split over `splits` programs. The two kernels that write a
    map walk channels-first memory flat, in blocks of block_columns elements with block_rows 1, each
    of which is a program; there `splits` is 1.
    """

    block_rows: int
    block_columns: int
    splits: int
    num_warps: int


def tiling(
    shape: Geometry, config: LaunchConfig, dtype: torch.dtype, *, writes_map: bool = False
) -> Tiling:
    """What a kernel knows when it is compiled: how it walks a tensor of this shape and dtype."""
    span_rows = 1
    if writes_map and not shape.channels_last:
        most_rows = triton.cdiv(config.block_columns, max(shape.columns, 2)) + 1
        span_rows = triton.next_power_of_2(most_rows)
    return Tiling(
        shape.channels_last,
        shape.vector,
        shape.aligned,
        config.block_rows,
        config.block_columns,
        span_rows,
        tl.int64 if shape.elements >= WIDE_FROM else tl.int32,
        tl.float64 if dtype == torch.float64 else tl.float32,
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter, a small number."""
    if device.type == "cpu":
        return MULTIPROCESSORS_OF_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


def default_config(kernel: str, shape: Geometry, multiprocessors: int) -> LaunchConfig:
    """A config that is good on any GPU, from sizes and the number of multiprocessors.

    kernel: "moments", "grad_moments", "normalize" or "grad_input".
    """
    tensors_read = 2 if kernel in ("grad_moments", "grad_input") else 1
    elements_of_warp = 32 * max(shape.vector, 4) * VECTORS_OF_THREAD // tensors_read
    if kernel in REDUCTIONS:
        if kernel == "moments" and _rows_share_vectors(shape):
            elements_of_warp //= 2
        elif kernel == "grad_moments" and shape.channels_last and shape.vector == 4:
            elements_of_warp *= 2
        return _tiles(kernel, shape, elements_of_warp, multiprocessors)
    # Each warp computes the coefficients of its channels anew, so that it takes many elements.
    if kernel == "grad_input" and shape.vector >= 4:
        whole_rows = shape.channels_last or shape.aligned
        if whole_rows or shape.columns >= 2 * elements_of_warp * WARPS_OF_PROGRAM:
            elements_of_warp *= 2
    if shape.channels_last:
        return _tiles(kernel, shape, elements_of_warp, multiprocessors)
    while elements_of_warp > max(MOST_ROWS_OF_WARP * shape.columns, 32):
        elements_of_warp //= 2
    block = elements_of_warp * WARPS_OF_PROGRAM
    while block > elements_of_warp and shape.elements < 2 * block * multiprocessors:
        block //= 2
    return LaunchConfig(1, block, 1, block // elements_of_warp)


def _rows_share_vectors(shape: Geometry) -> bool:
    """Whether eight elements of a vector may belong to two rows: each then takes registers of its
    own, which fills them.
    """
    return not shape.channels_last and not shape.aligned and shape.vector > 4


def slots(kernel: str, shape: Geometry, config: LaunchConfig, multiprocessors: int) -> int:
    """Programs that run at the same time, as far as their registers go."""
    resident = RESIDENT_WARPS
    if kernel == "moments" and _rows_share_vectors(shape):
        resident = RESIDENT_SMALL_WARPS
    elif kernel == "normalize" and shape.channels_last:
        resident = RESIDENT_WRITING_WARPS
    return resident // config.num_warps * multiprocessors


def _tiles(
    kernel: str, shape: Geometry, elements_of_warp: int, multiprocessors: int
) -> LaunchConfig:
    """Tiles of so many elements per warp, and splits that keep all multiprocessors busy.

    A channels-first channel is added up by single warps, which need not wait for each other; where
    channels are added up side by side, larger programs leave fewer partial sums behind.
    """
    most = elements_of_warp
    if shape.channels_last:
        most *= WARPS_OF_PROGRAM
        widest = CHANNELS_OF_REDUCTION if kernel in REDUCTIONS else _channels_of_writer(shape)
        block_columns = min(triton.next_power_of_2(shape.channels), widest)
    else:
        longest = max(span_of_row(shape), shape.vector)
        block_columns = min(triton.next_power_of_2(longest), most)
    block_rows = min(most // block_columns, triton.next_power_of_2(max(shape.rows, 1)))
    warps = max(block_rows * block_columns // elements_of_warp, 1)
    config = LaunchConfig(block_rows, block_columns, 1, warps)
    tiles = count_tiles(shape, block_rows, block_columns)
    blocks = reduction_blocks(shape, config)
    available = slots(kernel, shape, config, multiprocessors)

    def cost(config: LaunchConfig) -> tuple[int, int]:
        """Waves times the tiles of the longest program; then, the splits."""
        waves = triton.cdiv(blocks * config.splits, available)
        return waves * (triton.cdiv(tiles, config.splits) + TILES_OF_OVERHEAD), config.splits

    filling = (max(waves * available // blocks, 1) for waves in range(1, MOST_WAVES + 1))
    return min(
        (fit_splits(kernel, shape, config._replace(splits=splits)) for splits in filling),
        key=cost,
    )


def _channels_of_writer(shape: Geometry) -> int:
    def lanes_with_a_channel(width: int) -> float:
        return shape.channels / (triton.cdiv(shape.channels, width) * width)

    # In float64 the coefficients of 128 channels are too many for the registers of an sm120.
    chosen = CHANNELS_OF_WRITER if shape.vector >= 4 else CHANNELS_OF_WRITER[1:]
    widths = (min(width, triton.next_power_of_2(shape.channels)) for width in chosen)
    return max(widths, key=lambda width: min(lanes_with_a_channel(width), 0.75))


def fit_splits(kernel: str, shape: Geometry, config: LaunchConfig) -> LaunchConfig:
    """The config with its `splits` made to fit a shape: each program has a tile, and none has a
    chain that is too long.
    """
    if kernel in WRITERS and not shape.channels_last:
        return config._replace(splits=1)
    tiles = count_tiles(shape, config.block_rows, config.block_columns)
    fewest = triton.cdiv(tiles, LONGEST_CHAIN) if kernel in REDUCTIONS else 1
    splits = min(max(config.splits, fewest), tiles, MOST_SPLITS)
    return config._replace(splits=max(splits, 1))


def tile_beside_residual(shape: Geometry, config: LaunchConfig, item_size: int) -> LaunchConfig:
    """The config with half the elements in a tile, if it has more than a vector: a residual, or its
    gates, take registers as x does. Tiles of float64 have few enough elements as they are.
    """
    if item_size == 8:
        return config
    if config.block_rows > 1:
        return config._replace(block_rows=config.block_rows // 2)
    return config._replace(block_columns=max(config.block_columns // 2, 8, shape.vector))


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


def writer_programs(shape: Geometry, config: LaunchConfig) -> tuple[int, int]:
    """How many programs write a map, and 2**32 / columns rounded up, which divides by columns."""
    if shape.channels_last:
        return triton.cdiv(shape.channels, config.block_columns) * config.splits, 0
    blocks = triton.cdiv(shape.elements, config.block_columns)
    return blocks, triton.cdiv(2**32, max(shape.columns, 2))
