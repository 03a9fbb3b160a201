"""Offsets and channels where a tensor has more than 2**31 elements, computed without its memory."""

import math
import os

import numpy as np
import pytest
import torch

from tests.support.inputs import LAYOUTS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
indexing = pytest.importorskip("triton_syncbn.kernels.indexing")
output_indexing = pytest.importorskip("triton_syncbn.kernels.output_indexing")

ROWS, COLUMNS = 4, 1024  # of a tile
VECTOR = 8
# samples, channels, positions: more than 2**31 elements, in rows of whole vectors and in odd ones
SHAPES = [(3, 11, 2**27), (3, 1024, 2**21 + 16), (40, 24, 2**22 + 3), (2**20 + 1, 2**12 + 8, 1)]


@triton.jit
def reduction_tile(
    offsets,
    valid,
    tile,
    block,
    rows,
    channels,
    columns,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr = tl.int64,
):
    """What a program of a reduction reads as its tile number `tile`."""
    place, _load, begin, end, _number = indexing.locate_tile(
        tile,
        block + tl.program_id(0),
        rows,
        channels,
        columns,
        CHANNELS_LAST,
        VECTOR,
        ROWS,
        COLUMNS,
        False,
        INDEX,
    )
    is_valid = indexing.lanes_between(begin, end, CHANNELS_LAST, VECTOR, COLUMNS, False)
    out = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(offsets + out, place)
    tl.store(valid + out, is_valid)


@triton.jit
def output_block(
    offsets,
    owners,
    program,
    rows,
    channels,
    columns,
    COLUMNS: tl.constexpr,
    SPAN_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a program that writes a channels-first map writes, and to which channel each belongs."""
    block, tile, _first, _end = output_indexing.tiles_of_program(
        tl.program_id(0) + program, rows, channels, columns, 1, False, 1, COLUMNS, INDEX
    )
    channel, _mask, row = output_indexing.channels_of_tile(
        tile, block, channels, columns, 0, False, VECTOR, COLUMNS, SPAN_ROWS, INDEX, False
    )
    place, _present = output_indexing.locate_output_tile(
        tile, block, rows, channels, columns, False, VECTOR, 1, COLUMNS, INDEX
    )
    lane = tl.arange(0, COLUMNS)[None, :]
    tl.store(offsets + lane, place)
    tl.store(owners + lane, output_indexing.spread(channel, row, False, SPAN_ROWS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_last_tile_of_a_reduction_is_where_it_should_be(shape, layout, device):
    samples, channels, positions = shape
    last = layout == "channels_last"
    rows, columns = (samples * positions, 1) if last else (samples, positions)
    block = (channels - 1) // COLUMNS if last else channels - 1
    vector = math.gcd(channels, VECTOR) if last else VECTOR
    seen = indexing.Geometry(last, rows, channels, columns, vector)
    tile_rows = ROWS if last else 1
    tile = indexing.count_tiles(seen, tile_rows, COLUMNS) - 1
    offsets = torch.empty((tile_rows, COLUMNS), dtype=torch.int64, device=device)
    valid = torch.zeros((tile_rows, COLUMNS), dtype=torch.bool, device=device)
    reduction_tile[(1,)](
        *(offsets, valid, tile, block, rows, channels, columns),
        *(last, vector, tile_rows, COLUMNS),
    )
    found = offsets[valid].cpu().numpy()
    elements = samples * channels * positions
    assert found.max() == elements - 1
    if last:
        assert (found // channels >= rows - ROWS).all()
    else:  # the end of the last row, which belongs to the last channel
        assert (found // positions == samples * channels - 1).all()
    assert (np.sort(found) == np.unique(found)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tile_past_the_end_holds_nothing_in_32_bits(layout, device):
    """The furthest that a program asks for, of the longest tensor whose offsets are 32-bit."""
    from triton_syncbn.kernels import launch_config

    rows, tile_rows = launch_config.WIDE_FROM - 1, 64
    tiles = triton.cdiv(rows, tile_rows)
    programs = tiles  # no launch has more of them for a channel
    tile = tiles - 1 + programs
    offsets = torch.zeros((tile_rows, 1), dtype=torch.int64, device=device)
    valid = torch.ones((tile_rows, 1), dtype=torch.bool, device=device)
    reduction_tile[(1,)](
        *(offsets, valid, tile, 0, rows, 1, 1),
        *(layout == "channels_last", 1, tile_rows, 1, tl.int32),
    )
    assert not valid.any()


@triton.jit
def sum_kernel(target, number):
    tl.store(target, number + number)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_a_number_that_does_not_fit_32_bits_is_an_error_in_these_tests():
    target = torch.zeros(1, dtype=torch.int32)
    sum_kernel[(1,)](target, 2**30 - 1)
    assert target.item() == 2**31 - 2
    with pytest.raises(Exception, match="int32 overflow"):
        sum_kernel[(1,)](target, 2**30)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_last_block_that_is_written_is_where_it_should_be(shape, device):
    from triton_syncbn.kernels import launch_config

    samples, channels, positions = shape
    seen = indexing.Geometry(False, samples, channels, positions, VECTOR)
    config = launch_config.LaunchConfig(1, COLUMNS, 1, 4)
    programs, span_rows, _reciprocal, index = launch_config.output_grid(seen, config)
    elements = samples * channels * positions
    for program in (0, programs // 3, programs - 1):
        offsets, owners = torch.empty((2, COLUMNS), dtype=torch.int64, device=device)
        output_block[(1,)](
            *(offsets, owners, program, samples, channels, positions),
            *(COLUMNS, span_rows, VECTOR, index),
        )
        start = (programs - 1 - program) * COLUMNS  # from the end of the tensor to its start
        expected = np.arange(start, start + COLUMNS)
        assert (offsets.cpu().numpy() == expected).all()
        inside = expected < elements
        owner = expected // positions % channels
        assert (owners.cpu().numpy()[inside] == owner[inside]).all()
