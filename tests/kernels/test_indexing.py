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
    number,
    block,
    rows,
    channels,
    columns,
    TILING: tl.constexpr,
):
    """What a program of a reduction reads as its tile number `number`."""
    sizes = indexing.Sizes(rows, channels, columns)
    tile = indexing.locate_tile(number, block + tl.program_id(0), sizes, TILING)
    row, lane = (
        tl.arange(0, TILING.block_rows)[:, None],
        tl.arange(0, TILING.block_columns)[None, :],
    )
    out = row * TILING.block_columns + lane
    tl.store(offsets + out, tile.offsets)
    tl.store(valid + out, indexing.mask_of_channel(tile, TILING))


@triton.jit
def output_block(
    offsets,
    owners,
    program,
    rows,
    channels,
    columns,
    TILING: tl.constexpr,
):
    """What a program that writes a channels-first map writes, and to which channel each belongs."""
    sizes = indexing.Sizes(rows, channels, columns)
    walk = output_indexing.walk_of_program(tl.program_id(0) + program, 1, sizes, TILING)
    channel, owner = output_indexing.channels_of_walk(walk, sizes, 0, TILING)
    place, _mask = output_indexing.locate_output_tile(walk.last, walk.block, sizes, TILING)
    lane = tl.arange(0, TILING.block_columns)[None, :]
    tl.store(offsets + lane, place)
    tl.store(owners + lane, output_indexing.spread(channel.index, owner, TILING))


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
    tiling = indexing.Tiling(last, vector, False, tile_rows, COLUMNS, 1, tl.int64, tl.float32)
    reduction_tile[(1,)](offsets, valid, tile, block, rows, channels, columns, tiling)
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
    splits = tiles  # no launch has more of them
    tile = tiles - 1 + splits
    offsets = torch.zeros((tile_rows, 1), dtype=torch.int64, device=device)
    valid = torch.ones((tile_rows, 1), dtype=torch.bool, device=device)
    last = layout == "channels_last"
    tiling = indexing.Tiling(last, 1, False, tile_rows, 1, 1, tl.int32, tl.float32)
    reduction_tile[(1,)](offsets, valid, tile, 0, rows, 1, 1, tiling)
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
    programs, _reciprocal = launch_config.writer_programs(seen, config)
    tiling = launch_config.tiling(seen, config, torch.float32, writes_map=True)
    elements = samples * channels * positions
    for program in (0, programs // 3, programs - 1):
        offsets, owners = torch.empty((2, COLUMNS), dtype=torch.int64, device=device)
        output_block[(1,)](offsets, owners, program, samples, channels, positions, tiling)
        start = (programs - 1 - program) * COLUMNS  # from the end of the tensor to its start
        expected = np.arange(start, start + COLUMNS)
        assert (offsets.cpu().numpy() == expected).all()
        inside = expected < elements
        owner = expected // positions % channels
        assert (owners.cpu().numpy()[inside] == owner[inside]).all()
