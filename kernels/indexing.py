"""Where the values of a channel lie in memory, in the two layouts that the kernels walk.

A tensor of shape (N, C, *spatial), S = product of the spatial sizes, is seen as

    channels first   N x C rows of S values; a row belongs to one channel
    channels last    N * S rows of C values; a column belongs to one channel

Reductions read tiles of [block_rows, block_columns]: in channels-last memory rows x channels, in
channels-first memory samples x positions of one channel. The columns of a tile are consecutive in
memory.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

VECTOR_BYTES = 16  # the widest load and store of one thread


class Geometry(NamedTuple):
    """A dense tensor as the kernels see it: its sizes, and the elements of one access."""

    channels_last: bool
    rows: int  # channels first: N; channels last: N * S
    channels: int
    columns: int  # consecutive values of one channel in memory: S; channels last: 1
    vector: int  # elements in an aligned access, a power of two

    @property
    def values(self) -> int:
        """Values of one channel."""
        return self.rows * self.columns

    @property
    def elements(self) -> int:
        """Values of all channels."""
        return self.values * self.channels

    @property
    def aligned(self) -> bool:
        """Whether rows are whole numbers of vectors."""
        return self.columns % self.vector == 0


def geometry(tensor: torch.Tensor) -> Geometry:
    """See a tensor (N, C, *spatial), dense in either layout, as rows and columns."""
    return geometry_of(tensor.shape, tensor.is_contiguous(), tensor.element_size())


def geometry_of(sizes: torch.Size, contiguous: bool, item_size: int) -> Geometry:
    """The same, of its sizes, layout and bytes of an element."""
    samples, channels = sizes[:2]
    positions = math.prod(sizes[2:])
    widest = VECTOR_BYTES // item_size
    if positions == 1 or not contiguous:
        return Geometry(True, samples * positions, channels, 1, math.gcd(channels, widest))
    if channels == 1:
        samples, positions = 1, samples * positions
    # A row may start anywhere; it is read as the aligned vectors that cover it, and the last of
    # those ends inside the tensor only if the tensor is a whole number of vectors.
    return Geometry(False, samples, channels, positions, math.gcd(math.prod(sizes), widest))


def span_of_row(shape: Geometry) -> int:
    """Elements of the aligned vectors that cover a channels-first row; channels last: 0."""
    if shape.channels_last:
        return 0
    return shape.columns + (0 if shape.aligned else shape.vector - 1)


def count_tiles(shape: Geometry, block_rows: int, block_columns: int) -> int:
    """Tiles of one channel (channels first) or of one block of channels (channels last)."""
    chunks = 1 if shape.channels_last else triton.cdiv(span_of_row(shape), block_columns)
    return triton.cdiv(shape.rows, block_rows) * chunks


class Tiling(NamedTuple):
    """What a kernel knows of its tensors when it is compiled, as one `TILING: tl.constexpr`."""

    channels_last: bool
    vector: int  # elements in an aligned access
    aligned: bool  # channels-first rows are whole numbers of vectors: none has elements of two
    block_rows: int  # of a tile
    block_columns: int  # of a tile, or of a flat block
    span_rows: int  # rows that a flat block can touch, a power of two
    index: tl.dtype  # of offsets
    compute: tl.dtype  # of the arithmetic on elements

    @property
    def tile(self) -> tuple[int, int]:
        """The shape of a tile."""
        return self.block_rows, self.block_columns

    @property
    def bytes_and_bits(self) -> tuple[int, int, int]:
        """A tile of bits, by the byte that holds each."""
        return self.block_rows, self.block_columns // 8, 8


class Sizes(NamedTuple):
    """What a kernel is told of its tensors when it runs: see Geometry."""

    rows: tl.tensor
    channels: tl.tensor
    columns: tl.tensor


class Channels(NamedTuple):
    """The channels that a program works on, and which of them exist."""

    index: tl.tensor
    mask: tl.tensor


class Tile(NamedTuple):
    """Where a tile lies, and which of its elements belong to the channel."""

    start: tl.tensor  # [block_rows, 1]: the offset of lane 0 of each row
    offsets: tl.tensor  # [block_rows, block_columns]
    mask: tl.tensor  # of what to load, constant over whole vectors
    begin: tl.tensor  # int32 [block_rows, 1]: the first lane of each row that belongs to it
    end: tl.tensor  # int32 [block_rows, 1]: the lane after the last one
    count: tl.tensor  # values of each channel in the tile


@triton.jit
def channels_of_block(block, sizes, TILING: tl.constexpr):
    """The channels that a program reduces, [1, block_columns] or [1, 1]."""
    if TILING.channels_last:
        index = block * TILING.block_columns + tl.arange(0, TILING.block_columns)[None, :]
    else:
        index = block + tl.arange(0, 1)[None, :]
    return Channels(index, index < sizes.channels)


@triton.jit
def cut_rows(sizes, TILING: tl.constexpr):
    """Cut a channels-first row into chunks that fit a tile and are equal to within one vector.

    Returns the number of chunks, the vectors of a chunk, and how many chunks (the first ones) hold
    a vector more.
    """
    rest = sizes.columns % TILING.vector  # where it is 0 every row is aligned
    vectors = sizes.columns // TILING.vector + tl.where(rest == 0, 0, tl.where(rest == 1, 1, 2))
    chunks = tl.maximum(tl.cdiv(vectors, TILING.block_columns // TILING.vector), 1)
    return chunks, vectors // chunks, vectors % chunks


@triton.jit
def tiles_of_block(sizes, TILING: tl.constexpr):
    """How many tiles a channel has, or a block of channels: `count_tiles` in a kernel."""
    tiles = tl.cdiv(sizes.rows, TILING.block_rows)
    if not TILING.channels_last:
        tiles *= cut_rows(sizes, TILING)[0]
    return tiles


@triton.jit
def locate_tile(number, block, sizes, TILING: tl.constexpr):
    """Place tile `number` of a channel, or of a block of channels; after the last tile come tiles
    that hold nothing.
    """
    row = tl.arange(0, TILING.block_rows)[:, None].to(TILING.index)
    lane = tl.arange(0, TILING.block_columns)[None, :]
    vector_start = lane // TILING.vector * TILING.vector
    if TILING.channels_last:
        first_row = number.to(TILING.index) * TILING.block_rows
        row += first_row
        first = block * TILING.block_columns
        start = row * (sizes.channels // TILING.vector * TILING.vector)
        offsets = start + (first + lane)
        start += first
        begin = tl.zeros_like(row).to(tl.int32)
        end = tl.where(row < sizes.rows, sizes.channels - first, 0)
        count = tl.minimum(sizes.rows - first_row, TILING.block_rows)
    else:
        chunks, chunk_vectors, longer_chunks = cut_rows(sizes, TILING)
        first_row = (number // chunks).to(TILING.index) * TILING.block_rows
        chunk = number % chunks
        row += first_row
        row_start = (row * sizes.channels + block) * sizes.columns
        aligned_start = row_start // TILING.vector * TILING.vector
        if TILING.aligned:  # the compiler does not find out
            row_start = aligned_start
        before = row_start - aligned_start  # values of the row before, in the first vector
        first = (chunk * chunk_vectors + tl.minimum(chunk, longer_chunks)).to(TILING.index)
        first *= TILING.vector
        size = (chunk_vectors + tl.where(chunk < longer_chunks, 1, 0)) * TILING.vector
        begin = tl.maximum(before - first, 0).to(tl.int32)
        end = tl.minimum(before + sizes.columns - first, size)
        end = tl.where(row < sizes.rows, end, 0).to(tl.int32)
        start = aligned_start + first
        offsets = start + lane
        if TILING.block_rows == 1:
            count = tl.sum(tl.maximum(end - begin, 0))
        else:  # several rows fit one tile only if no row is cut
            count = tl.minimum(sizes.rows - first_row, TILING.block_rows) * sizes.columns
    return Tile(start, offsets, vector_start < end, begin, end, tl.maximum(count, 0))


@triton.jit
def mask_of_channel(tile, TILING: tl.constexpr):
    """The mask of the elements of a tile that belong to its channel.

    Made where it is used: a mask of every element does not fit the registers that two bounds do.
    """
    lane = tl.arange(0, TILING.block_columns)[None, :]
    if TILING.channels_last or TILING.aligned:
        return lane // TILING.vector * TILING.vector < tile.end
    else:
        return (lane >= tile.begin) & (lane < tile.end)


@triton.jit
def sum_over_values(elements, TILING: tl.constexpr):
    """Sum a tile over the values of each channel: [1, block_columns] or [1, 1]."""
    total = tl.sum(elements, axis=0, keep_dims=True)
    if not TILING.channels_last:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total
