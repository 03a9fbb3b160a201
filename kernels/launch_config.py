"""How a kernel is launched: tile, programs, warps. It changes speed and nothing else."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .indexing import Geometry, count_tiles, span_of_row

REDUCTIONS = ("moments", "grad_moments")
WRITERS = ("normalize", "grad_input")
# Values that one float32 lane adds up in a row. It bounds the rounding of a lane to 64/4 units in
# the last place even for data whose roundings do not average out (masks, one-hot inputs), and the
# harm of an outlier in the first tile.
LONGEST_CHAIN = 64
MOST_PROGRAMS = 65535  # that share a channel
VECTORS_OF_THREAD = 4  # 16-byte loads in flight in each thread, of all the tensors it reads
MOST_WARPS = 4
RESIDENT_WARPS = 16  # of 128 registers a thread: so many fit a multiprocessor of any GPU
RESIDENT_SMALL_WARPS = 24  # of 80 registers
START = 2  # what a program costs beside its tiles, in tiles
MOST_WAVES = 8
MOST_ROWS_OF_WARP = 64  # that a flat block touches: their coefficients are held in registers
MULTIPROCESSORS_OF_INTERPRETER = 4  # enough to split reductions, few enough to run in Python
# From here on offsets are 64-bit. A program asks for one tile more than it has, which may lie as
# far past the end as the end is far.
WIDE_FROM = 2**30


class LaunchConfig(NamedTuple):
    """block_rows x block_columns elements a tile; `programs` share a channel; warps of a program.

    The two kernels that write a map the size of the input walk channels-first memory flat, in
    blocks of block_columns elements. There block_rows is 1, and `programs` is into how many equal
    parts the tensor is cut, that are walked side by side.
    """

    block_rows: int
    block_columns: int
    programs: int
    num_warps: int


def compute_dtype(tensor: torch.Tensor) -> tl.dtype:
    """The dtype a kernel computes in: float64 for float64 input, else float32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def index_dtype(shape: Geometry) -> tl.dtype:
    """The dtype of offsets: 64 bits where 32 may not suffice; they take twice the instructions."""
    return tl.int64 if shape.values * shape.channels >= WIDE_FROM else tl.int32


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
    of_warp = 32 * max(shape.vector, 4) * VECTORS_OF_THREAD // tensors_read
    if kernel in REDUCTIONS or shape.channels_last:
        if kernel == "moments" and _apart(shape):
            of_warp //= 2
        return _tiles(kernel, shape, of_warp, multiprocessors)
    # Each warp computes the coefficients of its channels anew, so that it takes many elements.
    if kernel == "grad_input" and shape.columns % shape.vector == 0 and shape.vector >= 4:
        of_warp *= 2
    while of_warp > max(MOST_ROWS_OF_WARP * shape.columns, 32):
        of_warp //= 2
    block = of_warp * MOST_WARPS
    elements = shape.values * shape.channels
    while block > of_warp and elements < 2 * block * multiprocessors:
        block //= 2
    # Where the channels do not all run at once, the reduction leaves the last of them in the cache,
    # of every sample. So all samples are walked side by side, from the last channel to the first.
    before = REDUCTIONS[WRITERS.index(kernel)]
    reduction = default_config(before, shape, multiprocessors)
    one_by_one = shape.channels * reduction.programs > slots(
        before, shape, reduction, multiprocessors
    )
    return LaunchConfig(1, block, max(shape.rows, 1) if one_by_one else 1, block // of_warp)


def _apart(shape: Geometry) -> bool:
    """Whether the elements of a vector may belong to two rows: each then takes registers of its
    own, which fills them where a vector holds eight.
    """
    return not shape.channels_last and shape.columns % shape.vector != 0 and shape.vector > 4


def slots(kernel: str, shape: Geometry, config: LaunchConfig, multiprocessors: int) -> int:
    """Programs that run at the same time, as far as their registers go."""
    small = kernel == "moments" and _apart(shape)
    resident = RESIDENT_SMALL_WARPS if small else RESIDENT_WARPS
    return resident // config.num_warps * multiprocessors


def _tiles(kernel: str, shape: Geometry, of_warp: int, multiprocessors: int) -> LaunchConfig:
    """Tiles of so many elements a warp, and programs that keep all multiprocessors busy.

    A channels-first channel is added up by single warps, which need not wait for each other; where
    channels are added up side by side, larger programs leave fewer partial sums behind.
    """
    most = of_warp
    if shape.channels_last:
        most *= MOST_WARPS
        block_columns = min(triton.next_power_of_2(shape.channels), 64)
        if 0 < shape.channels % 64 <= 32 < shape.channels:
            block_columns = 32  # fewer lanes without a channel
    else:
        longest = max(span_of_row(shape), shape.vector)
        block_columns = min(triton.next_power_of_2(longest), most)
    block_rows = min(most // block_columns, triton.next_power_of_2(max(shape.rows, 1)))
    warps = max(block_rows * block_columns // of_warp, 1)
    config = LaunchConfig(block_rows, block_columns, 1, warps)
    tiles = count_tiles(shape, block_rows, block_columns)
    blocks = reduction_blocks(shape, config)
    available = slots(kernel, shape, config, multiprocessors)

    def cost(config: LaunchConfig) -> tuple[int, int]:
        """Waves times the tiles of the longest program; then, how many programs."""
        waves = triton.cdiv(blocks * config.programs, available)
        return waves * (triton.cdiv(tiles, config.programs) + START), config.programs

    filling = (max(waves * available // blocks, 1) for waves in range(1, MOST_WAVES + 1))
    return min(
        (fit_programs(kernel, shape, config._replace(programs=programs)) for programs in filling),
        key=cost,
    )


def fit_programs(kernel: str, shape: Geometry, config: LaunchConfig) -> LaunchConfig:
    """The config with its `programs` made to fit a shape: each has a tile, none has a chain that is
    too long, and parts that are walked side by side are samples.
    """
    if kernel in WRITERS and not shape.channels_last:
        return config._replace(programs=max(shape.rows, 1) if config.programs > 1 else 1)
    tiles = count_tiles(shape, config.block_rows, config.block_columns)
    fewest = triton.cdiv(tiles, LONGEST_CHAIN) if kernel in REDUCTIONS else 1
    programs = min(max(config.programs, fewest), tiles, MOST_PROGRAMS)
    return config._replace(programs=max(programs, 1))


@functools.lru_cache(maxsize=4096)
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


@functools.lru_cache(maxsize=4096)
def output_grid(shape: Geometry, config: LaunchConfig) -> tuple[int, int, int, tl.dtype]:
    """How a map is written: programs, rows that a flat block can touch, 2**32 / columns rounded up,
    and the dtype of offsets.

    Channels-last maps are written in tiles, channels-first maps in blocks of consecutive elements.
    """
    if shape.channels_last:
        programs = triton.cdiv(shape.channels, config.block_columns) * config.programs
        return programs, 1, 0, index_dtype(shape)
    elements = shape.values * shape.channels
    columns = max(shape.columns, 2)
    span_rows = triton.next_power_of_2(triton.cdiv(config.block_columns, columns) + 1)
    programs = triton.cdiv(triton.cdiv(elements, config.block_columns), config.programs)
    programs *= config.programs
    return programs, span_rows, triton.cdiv(2**32, columns), index_dtype(shape)
