"""Where a program writes a map of the input's size, and whose each element of it is.

Channels-last maps are written in tiles, channels-first maps in flat blocks of consecutive elements.
Both are taken from the end of the tensor to its start: what the reduction before has read last is
still in the cache.
"""

import triton
import triton.language as tl

from .indexing import locate_tile


@triton.jit
def tiles_of_program(
    program,
    rows,
    channels,
    columns,
    splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a program writes: a block of channels, and of it the tiles `last - number` for `number`
    in range(first, end, splits).

    Tiles are taken from the end of the tensor to its start; flat blocks, of which a program has one
    or none, from the ends of `splits` equal parts of the tensor to their starts.
    """
    if CHANNELS_LAST:
        blocks = tl.cdiv(channels, BLOCK_COLUMNS)
        block = program % blocks
        first = program // blocks
        end = tl.cdiv(rows, BLOCK_ROWS)
        last = end - 1
    else:
        block = 0
        elements = rows.to(INDEX) * channels * columns
        flat_blocks = tl.cdiv(elements, BLOCK_COLUMNS)
        last = flat_blocks - 1 - program
        if splits > 1:
            step = program.to(tl.uint32) // splits.to(tl.uint32)
            part = program - step.to(tl.int32) * splits
            last = (splits - part) * tl.cdiv(flat_blocks, splits) - 1 - step.to(tl.int32)
        first = 0
        end = tl.where(last < flat_blocks, 1, 0)
        last = tl.minimum(last, flat_blocks - 1)
    return block, last, first, end


@triton.jit
def channels_of_tile(
    tile,
    block,
    channels,
    columns,
    reciprocal,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The channels that a program writes, [K]; which of them exist; whose each element of it is.

    ALIGNED: rows are whole numbers of vectors, so that the elements of a vector have one owner.
    """
    lane = tl.arange(0, BLOCK_COLUMNS)
    if CHANNELS_LAST:
        channel = block * BLOCK_COLUMNS + lane
        row = lane
    else:
        start = tile.to(INDEX) * BLOCK_COLUMNS
        if tl.int32 == INDEX:  # unsigned, it takes half the instructions
            first_row = (start.to(tl.uint32) // columns.to(tl.uint32)).to(tl.int32)
            first_channel = first_row.to(tl.uint32) % channels.to(tl.uint32)
        else:
            first_row = start // columns
            first_channel = first_row % channels
        position = (start - first_row * columns).to(tl.int32)
        channel = first_channel.to(tl.int32) + tl.arange(0, SPAN_ROWS)
        if ALIGNED:
            lane = lane // VECTOR * VECTOR
        if SPAN_ROWS == 2:
            channel = tl.where(channel < channels, channel, channel - channels)
            row = (lane >= tl.minimum(columns - position, BLOCK_COLUMNS)).to(tl.int32)
        else:  # divides by columns, exactly: they are few enough for the rounding of the reciprocal
            channel %= channels
            numerator = (position + lane).to(tl.uint32)
            row = tl.umulhi(numerator, reciprocal.to(tl.uint32)).to(tl.int32)
    return channel, channel < channels, row


@triton.jit
def locate_output_tile(
    tile,
    block,
    rows,
    channels,
    columns,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Offsets and mask of a tile, [BLOCK_ROWS, BLOCK_COLUMNS], or of a flat block, one row."""
    if CHANNELS_LAST:
        offsets, mask, _begin, _end, _number = locate_tile(
            tile,
            block,
            rows,
            channels,
            columns,
            CHANNELS_LAST,
            VECTOR,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            False,
            INDEX,
        )
    else:
        lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
        start = tile.to(INDEX) * BLOCK_COLUMNS
        left = tl.minimum(rows.to(INDEX) * channels * columns - start, BLOCK_COLUMNS)
        offsets = start + lane
        mask = lane // VECTOR * VECTOR < left.to(tl.int32)
    return offsets, mask


@triton.jit
def spread(coefficient, row, CHANNELS_LAST: tl.constexpr, SPAN_ROWS: tl.constexpr):
    """Bring one value a channel to each element of a tile: [1, BLOCK_COLUMNS]."""
    if CHANNELS_LAST:
        return coefficient[None, :]
    elif SPAN_ROWS == 2:
        first, second = tl.split(coefficient)
        return tl.where(row > 0, second, first)[None, :]
    else:
        return tl.gather(coefficient, row, axis=0)[None, :]
