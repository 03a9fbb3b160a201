"""What default configs promise on every GPU, for every layer of perf/shapes.csv."""

import math

import pytest
from layers.cases import read_cases, suites

pytest.importorskip("triton")

import triton
from triton_syncbn.kernels import launch_config
from triton_syncbn.kernels.indexing import count_tiles, geometry
from triton_syncbn.kernels.launch_config import (
    REDUCTIONS,
    WRITERS,
    default_config,
    reduction_blocks,
    writer_programs,
)
from triton_syncbn.kernels.tuned_configs import bucket_of
from tuning.candidates import suits

GPUS = {  # multiprocessors
    "A100": 108,
    "H100 SXM, H200": 132,
    "H100 PCIe": 114,
    "L4": 58,
    "RTX 4090": 128,
    "B200": 148,
    "MI300X": 304,
    "a small one": 14,
}
DTYPES = ["bf16", "fp32", "fp64"]
CASES = read_cases(suites(), DTYPES, ["channels_first", "channels_last"])
SEEN = [(case, geometry(case.without_memory())) for case in CASES]


def programs_of(name, shape, config):
    if name in WRITERS:
        return writer_programs(shape, config)[0]
    return reduction_blocks(shape, config) * config.splits


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", REDUCTIONS + WRITERS)
def test_every_multiprocessor_has_work_where_there_is_enough(name, gpu):
    """Two programs a multiprocessor, and no fewer, once there are so many full blocks of elements
    (of whole rows: a tile holds one channel, and short rows do not fill it).
    """
    large = 0
    for case, shape in SEEN:
        config = default_config(name, shape, GPUS[gpu])
        elements = math.prod(case.shape)
        # what the tile of a full program holds, were the tensor large enough
        full = 128 * max(shape.vector, 4) * launch_config.VECTORS_OF_THREAD
        if elements >= 2 * GPUS[gpu] * full:
            large += 1
            assert programs_of(name, shape, config) >= 2 * GPUS[gpu], (case, config)
    assert large > 50, "hardly any layer is large enough to be tested"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", REDUCTIONS + WRITERS)
def test_a_default_fits_all_shapes_that_it_may_meet(name, gpu):
    """A default suits its whole bucket; its tile is no larger than four loads of each
    of 128 threads; programs are not more than tiles, chains not longer than accuracy allows.
    """
    for case, shape in SEEN:
        config = default_config(name, shape, GPUS[gpu])
        assert suits(bucket_of(name, shape, case.without_memory().dtype), config)
        tile = config.block_rows * config.block_columns
        assert tile <= 128 * max(shape.vector, 4) * launch_config.VECTORS_OF_THREAD
        if name in REDUCTIONS or shape.channels_last:
            tiles = count_tiles(shape, config.block_rows, config.block_columns)
            assert config.splits <= tiles
            if name in REDUCTIONS:
                assert tiles <= config.splits * launch_config.LONGEST_CHAIN


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_last_wave_of_a_reduction_is_not_nearly_empty(name, gpu):
    """Waves of programs times the tiles of the longest one: within 1.6 of an even share, for layers
    of 16 tiles a slot and more. Programs as many as four a multiprocessor and a few more would
    take twice as long as they need.
    """
    seen = 0
    for case, shape in SEEN:
        config = default_config(name, shape, GPUS[gpu])
        tiles = count_tiles(shape, config.block_rows, config.block_columns)
        blocks = reduction_blocks(shape, config)
        slots = launch_config.slots(name, shape, config, GPUS[gpu])
        if tiles * blocks < 16 * slots:
            continue
        seen += 1
        waves = triton.cdiv(blocks * config.splits, slots)
        longest = waves * triton.cdiv(tiles, config.splits)
        assert longest <= 1.6 * tiles * blocks / slots, (case, config)
    assert seen > 5
