"""Where the values of a channel lie in memory, in the two layouts that the kernels walk.

A tensor of shape (N, C, *spatial), S = product of the spatial sizes, is seen as

    channels first   N x C rows of S values; a row belongs to one channel
    channels last    N * S rows of C values; a column belongs to one channel

Reductions read tiles of [BLOCK_ROWS, BLOCK_COLUMNS]: in channels-last memory rows x channels, in
channels-first memory samples x positions of one channel. The columns of a tile are consecutive in
memory. Offsets are of the dtype INDEX: 64-bit where a tensor has 2**30 elements and more.
"""

import functools
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


def geometry(tensor: torch.Tensor) -> Geometry:
    """See a tensor (N, C, *spatial), dense in either layout, as rows and columns."""
    return _see(tensor.shape, tensor.is_contiguous(), tensor.element_size())


@functools.lru_cache(maxsize=4096)
def _see(sizes: torch.Size, contiguous: bool, item_size: int) -> Geometry:
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
    return shape.columns + (shape.vector - 1 if shape.columns % shape.vector else 0)


def count_tiles(shape: Geometry, block_rows: int, block_columns: int) -> int:
    """Tiles of one channel (channels first) or of one block of channels (channels last)."""
    chunks = 1 if shape.channels_last else triton.cdiv(span_of_row(shape), block_columns)
    return triton.cdiv(shape.rows, block_rows) * chunks


@triton.jit
def channels_of_block(block, channels, CHANNELS_LAST: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The channels that a program reduces, [1, BLOCK_COLUMNS] or [1, 1], and which exist."""
    if CHANNELS_LAST:
        channel = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    else:
        channel = block + tl.arange(0, 1)[None, :]
    return channel, channel < channels


@triton.jit
def cut_rows(columns, VECTOR: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Cut a channels-first row into chunks that fit a tile and are equal to within one vector.

    Returns the number of chunks, the vectors of a chunk, and how many chunks (the first ones) hold
    a vector more.
    """
    rest = columns % VECTOR  # where it is 0 every row is aligned
    vectors = columns // VECTOR + tl.where(rest == 0, 0, tl.where(rest == 1, 1, 2))
    chunks = tl.maximum(tl.cdiv(vectors, BLOCK_COLUMNS // VECTOR), 1)
    return chunks, vectors // chunks, vectors % chunks


@triton.jit
def locate_tile(
    tile,
    block,
    rows,
    channels,
    columns,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Place tile number `tile` of a channel, or of a block of channels. ALIGNED: channels-first
    rows are whole numbers of vectors, so that no vector holds elements of two.

    A tile after the last one holds nothing. Returns offsets [BLOCK_ROWS, BLOCK_COLUMNS]; the
    mask of what to load, constant over whole vectors; the lanes of each row that belong to the
    channel, from `begin` to before `end`, int32 [BLOCK_ROWS, 1]; and how many values of each
    channel the tile holds.
    """
    row = tl.arange(0, BLOCK_ROWS)[:, None].to(INDEX)
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    vector_start = lane // VECTOR * VECTOR
    if CHANNELS_LAST:
        first_row = tile.to(INDEX) * BLOCK_ROWS
        row += first_row
        first = block * BLOCK_COLUMNS
        offsets = row * (channels // VECTOR * VECTOR) + (first + lane)
        begin = tl.zeros([BLOCK_ROWS, 1], dtype=tl.int32)
        end = tl.where(row < rows, channels - first, 0)
        number = tl.minimum(rows - first_row, BLOCK_ROWS)
    else:
        chunks, chunk_vectors, longer_chunks = cut_rows(columns, VECTOR, BLOCK_COLUMNS)
        first_row = (tile // chunks).to(INDEX) * BLOCK_ROWS
        chunk = tile % chunks
        row += first_row
        row_start = (row * channels + block) * columns
        aligned_start = row_start // VECTOR * VECTOR
        if ALIGNED:  # the compiler does not find out
            row_start = aligned_start
        before = row_start - aligned_start  # values of the row before, in the first vector
        first = (chunk * chunk_vectors + tl.minimum(chunk, longer_chunks)).to(INDEX) * VECTOR
        size = (chunk_vectors + tl.where(chunk < longer_chunks, 1, 0)) * VECTOR
        begin = tl.maximum(before - first, 0).to(tl.int32)
        end = tl.minimum(before + columns - first, size)
        end = tl.where(row < rows, end, 0).to(tl.int32)
        offsets = (aligned_start + first) + lane
        if BLOCK_ROWS == 1:
            number = tl.sum(tl.maximum(end - begin, 0))
        else:  # several rows fit one tile only if no row is cut
            number = tl.minimum(rows - first_row, BLOCK_ROWS) * columns
    return offsets, vector_start < end, begin, end, tl.maximum(number, 0)


@triton.jit
def lanes_between(
    begin,
    end,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The mask of the elements of a tile that belong to the channel, from what `locate_tile` found.

    Made where it is used: a mask of every element does not fit the registers that two bounds do.
    """
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if CHANNELS_LAST or ALIGNED:
        return lane // VECTOR * VECTOR < end
    else:
        return (lane >= begin) & (lane < end)


@triton.jit
def sum_over_values(tile, CHANNELS_LAST: tl.constexpr):
    """Sum a tile over the values of each channel: [1, BLOCK_COLUMNS] or [1, 1]."""
    total = tl.sum(tile, axis=0, keep_dims=True)
    if not CHANNELS_LAST:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total
