"""Where a program writes a map of the input's size, and which channel each element belongs to.

Channels-last maps are written in tiles, channels-first maps in flat blocks of consecutive elements.
Both are taken from the end of the tensor to its start: what the reduction before has read last is
still in the cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .indexing import Channels, Tile, locate_tile


class Walk(NamedTuple):
    """What a program writes: of a block of channels the tiles `last - step`, for `step` in
    range(begin, end, splits). A flat block is the one tile of a program of a channels-first map.
    """

    block: tl.tensor
    last: tl.tensor
    begin: tl.tensor
    end: tl.tensor


@triton.jit
def walk_of_program(program, splits, sizes, TILING: tl.constexpr):
    """Tiles and flat blocks are taken from the end of the tensor to its start."""
    if TILING.channels_last:
        blocks = tl.cdiv(sizes.channels, TILING.block_columns)
        block = program % blocks
        begin = program // blocks
        end = tl.cdiv(sizes.rows, TILING.block_rows)
        return Walk(block, end - 1, begin, end)
    else:
        elements = sizes.rows.to(TILING.index) * sizes.channels * sizes.columns
        last = tl.cdiv(elements, TILING.block_columns) - 1 - program
        return Walk(0, last, 0, tl.where(last >= 0, 1, 0))


@triton.jit
def channels_of_walk(walk, sizes, reciprocal, TILING: tl.constexpr):
    """The channels that a program writes, [K], and for each element of a tile, which of these K it
    belongs to.
    """
    lane = tl.arange(0, TILING.block_columns)
    if TILING.channels_last:
        index = walk.block * TILING.block_columns + lane
        owner = lane
    else:
        start = walk.last.to(TILING.index) * TILING.block_columns
        if tl.int32 == TILING.index:  # unsigned, it takes half the instructions
            first_row = (start.to(tl.uint32) // sizes.columns.to(tl.uint32)).to(tl.int32)
            first_channel = first_row.to(tl.uint32) % sizes.channels.to(tl.uint32)
        else:
            first_row = start // sizes.columns
            first_channel = first_row % sizes.channels
        position = (start - first_row * sizes.columns).to(tl.int32)
        index = first_channel.to(tl.int32) + tl.arange(0, TILING.span_rows)
        if TILING.aligned:  # the elements of a vector have one owner
            lane = lane // TILING.vector * TILING.vector
        if TILING.span_rows == 2:
            index = tl.where(index < sizes.channels, index, index - sizes.channels)
            boundary = tl.minimum(sizes.columns - position, TILING.block_columns)
            owner = (lane >= boundary).to(tl.int32)
        else:  # divides by columns, exactly: they are few enough for the rounding of the reciprocal
            index %= sizes.channels
            numerator = (position + lane).to(tl.uint32)
            owner = tl.umulhi(numerator, reciprocal.to(tl.uint32)).to(tl.int32)
    return Channels(index, index < sizes.channels), owner


@triton.jit
def locate_output_tile(number, block, sizes, TILING: tl.constexpr):
    """Place a tile, [block_rows, block_columns], or a flat block, one row."""
    if TILING.channels_last:
        return locate_tile(number, block, sizes, TILING)
    else:
        lane = tl.arange(0, TILING.block_columns)[None, :]
        start = number.to(TILING.index) * TILING.block_columns
        elements = sizes.rows.to(TILING.index) * sizes.channels * sizes.columns
        left = tl.minimum(elements - start, TILING.block_columns)
        left = left.to(tl.int32)
        mask = lane // TILING.vector * TILING.vector < left
        return Tile(start, start + lane, mask, 0, left, left)


@triton.jit
def block_exists(walk):
    """Whether there is the flat block of a program, [1, 1]. There is; but the compiler does not
    know, and so it leaves the loads under this mask together. Others it moves down to their uses,
    and of four loads two are under way at a time.
    """
    return tl.arange(0, 1)[None, :] < walk.end


@triton.jit
def load_for_the_last_time(tensor, offsets, mask):
    """Load what a pass needs no more: it makes room in the cache before anything else does."""
    return tl.load(tensor + offsets, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def spread(coefficient, owner, TILING: tl.constexpr):
    """Bring one value per channel to each element of a tile: [1, block_columns]."""
    if TILING.channels_last:
        return coefficient[None, :]
    elif TILING.span_rows == 2:
        first, second = tl.split(coefficient)
        return tl.where(owner > 0, second, first)[None, :]
    else:
        return tl.gather(coefficient, owner, axis=0)[None, :]
