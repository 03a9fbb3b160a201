"""What the kernels move through memory, counted lane by lane in Triton's interpreter.

With T the bytes of x: moments loads T; normalize loads T and stores T; grad_moments loads 2 T;
grad_input loads 2 T and stores T. On top come the coefficients and partial sums of channels, and
in reductions over channels-first maps the neighbours of a row: it is read as the aligned vectors
that cover it.
"""

import functools
import math
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.support import interpreter
from tests.support.inputs import LAYOUTS, random
from tests.support.steps import kernel
from triton_syncbn import reference
from triton_syncbn.operands import RunningStatistics

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)

REDUCTIONS = ["moments", "grad_moments"]
WRITERS = ["normalize", "grad_input"]
KERNELS = REDUCTIONS + WRITERS
SHAPES = [
    (0, 3, 5, 5),
    (37, 20),
    (6, 8, 1, 1),
    (4, 2, 2, 1),
    (5, 3, 7, 7),  # an odd number of elements: no vectors
    (4, 2, 7, 7),
    (3, 1, 7, 7),
    (2, 4, 9, 11),
    (3, 2, 8, 8),
    (4, 2, 47, 47),
]
DTYPES = [torch.float32, torch.bfloat16]
CONFIGS = [
    "default",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("narrow", "tall")),
]
VECTOR_BYTES = 16
GUARD = 256  # elements before and after an input, in its storage


class Traffic(NamedTuple):
    """One launch: how often each element was loaded or stored, in the order of memory."""

    loads: dict[str, np.ndarray]  # of x and, where the kernel takes it, dy
    stores: np.ndarray  # of y or dx; of reductions, which write no map, empty
    loaded_beside: int  # bytes of everything else
    stored_beside: int
    programs: int
    channels_of_program: int  # that it holds coefficients of, at most


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same dense tensor amid a larger storage."""
    storage = tensor.new_zeros(tensor.numel() + 2 * GUARD)
    return storage.as_strided(tensor.shape, tensor.stride(), GUARD).copy_(tensor)


def make_config(config_name, name, seen, dtype):
    """The default config, or one that cuts what a channel holds for several programs."""
    from triton_syncbn.kernels.launch_config import LaunchConfig, default_config, multiprocessors

    narrow = config_name == "narrow"
    if config_name == "default":
        return default_config(name, seen, multiprocessors(torch.device("cpu")))
    if seen.channels_last:
        rows = max(triton.next_power_of_2(max(seen.rows, 1)) // (16 if narrow else 4), 1)
        return LaunchConfig(rows, 16, 3, 4) if narrow else LaunchConfig(rows, 8, 2, 4)
    row = triton.next_power_of_2(seen.columns + VECTOR_BYTES // dtype.itemsize - 1)
    if name in WRITERS:
        return LaunchConfig(1, max(row // 4, 32) if narrow else 2 * row, 1, 4)
    return LaunchConfig(1, max(row // 4, 16), 3, 4) if narrow else LaunchConfig(2, row, 2, 4)


@functools.cache
def measure(name, shape, layout, dtype, config_name) -> Traffic:
    """Launch a kernel once, under the meter."""
    from triton_syncbn.kernels import launch_config
    from triton_syncbn.kernels.indexing import geometry

    device = torch.device("cpu")
    x, dy = (guarded(random(shape, dtype, device, layout, seed=seed)) for seed in (0, 1))
    weight, bias, running_mean, running_var = torch.rand(4, shape[1]).unbind()
    counter = torch.tensor(0)
    moments = reference.moments(x)
    sums = reference.grad_moments(dy, x, moments, None, None, 1e-5)[0]
    seen = geometry(x)
    config = make_config(config_name, name, seen, dtype)
    settings = {"config": config}
    if name == "normalize":
        running = RunningStatistics(running_mean, running_var, counter, 0.1)
        settings |= {"eps": 1e-5, "running": running}
    arguments = {
        "moments": (x,),
        "normalize": (x, moments, weight, bias),
        "grad_moments": (dy, x, moments, weight.dtype, bias.dtype, 1e-5),
        "grad_input": (dy, x, moments, sums, weight, 1e-5),
    }[name]
    with interpreter.metered() as meter:
        output = kernel(name, device)(*arguments, **settings)

    maps = {"x": x} if name in ("moments", "normalize") else {"x": x, "dy": dy}
    loads = {label: meter.counts("load", tensor) for label, tensor in maps.items()}
    stores = meter.counts("store", output if name in WRITERS else x.new_empty(0))
    if name in REDUCTIONS:
        programs = launch_config.reduction_blocks(seen, config) * config.splits
        channels_of_program = 1
    else:
        programs = launch_config.writer_programs(seen, config)[0]
        # the rows that a block of elements can touch, rounded up to a power of two
        channels_of_program = 2 * (config.block_columns // seen.columns + 2)
    if seen.channels_last:
        channels_of_program = min(config.block_columns, shape[1])
    return Traffic(
        loads,
        stores,
        meter.bytes("load") - sum(int(count.sum()) for count in loads.values()) * x.itemsize,
        meter.bytes("store") - int(stores.sum()) * x.itemsize,
        programs,
        channels_of_program,
    )


def covering_rows(shape, layout, dtype) -> np.ndarray:
    """For each element in the order of memory, the rows whose aligned vectors hold it: its own
    and, in channels-first maps of odd sizes, neighbours.
    """
    elements, positions = math.prod(shape), math.prod(shape[2:])
    if layout == "channels_last" or positions == 1 or shape[1] == 1:
        return np.ones(elements, dtype=np.int64)  # all of memory is one run of rows, or one row
    vector = VECTOR_BYTES // dtype.itemsize
    starts = np.arange(0, elements, positions)
    changes = np.zeros(elements + 1, dtype=np.int64)
    np.add.at(changes, starts // vector * vector, 1)
    np.add.at(changes, np.minimum(-(-(starts + positions) // vector) * vector, elements), -1)
    return changes.cumsum()[:-1]


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_config = pytest.mark.parametrize("config", CONFIGS)


@every_config
@every_dtype
@every_layout
@every_shape
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_load_each_element_once_for_each_row_whose_vectors_hold_it(
    name, shape, layout, dtype, config
):
    """T bytes of x, and of dy, and at most 2 (V - 1) neighbours a row; none where rows are a whole
    number of vectors, V elements each.
    """
    vector = VECTOR_BYTES // dtype.itemsize
    positions = math.prod(shape[2:])
    most = covering_rows(shape, layout, dtype)
    for label, count in measure(name, shape, layout, dtype, config).loads.items():
        assert count.size == math.prod(shape)
        assert (count >= 1).all(), f"{label}: elements are not read"
        neighbours = count.sum() - count.size
        if layout == "channels_last" or positions % vector == 0:
            assert neighbours == 0, label
        assert neighbours <= 2 * (vector - 1) * math.prod(shape[:2]), label
        assert (count <= most).all(), f"{label}: elements are read in vain"


@every_config
@every_dtype
@every_layout
@every_shape
@pytest.mark.parametrize("name", WRITERS)
def test_writers_load_and_store_each_element_once(name, shape, layout, dtype, config):
    traffic = measure(name, shape, layout, dtype, config)
    for label, count in (*traffic.loads.items(), ("output", traffic.stores)):
        assert count.size == math.prod(shape)
        assert (count == 1).all(), label


@every_config
@every_dtype
@every_layout
@every_shape
@pytest.mark.parametrize("name", KERNELS)
def test_all_else_is_a_few_numbers_for_each_channel_of_a_program(
    name, shape, layout, dtype, config
):
    """Statistics and sums are float64 and come in pairs, 16 bytes a channel; parameters and buffers
    here are float32. `held` counts channels program by program, as often as they are held.
    """
    traffic = measure(name, shape, layout, dtype, config)
    channels, programs = shape[1], traffic.programs
    held = programs * traffic.channels_of_program
    loaded, stored = {
        # partial sums left and added up, an arrival counted and set back; sums and count
        "moments": (16 * held + 4 * programs, 16 * held + 8 * programs + 16 * channels + 8),
        # the same, after the moments and the count; sums and two gradients
        "grad_moments": (32 * held + 12 * programs, 16 * held + 8 * programs + 24 * channels),
        # moments, weight, bias, and the count; once more the moments with the two buffers, the
        # count for each of their blocks of 256 and twice, and the counter of batches
        "normalize": (
            24 * held + 8 * programs + 24 * channels + 8 * (channels // 256 + 3),
            8 * channels + 8,
        ),
        # moments, sums and weight, and the count
        "grad_input": (36 * held + 8 * programs, 0),
    }[name]
    assert traffic.loaded_beside <= loaded
    assert traffic.stored_beside <= stored


@every_layout
@pytest.mark.parametrize(
    ("name", "maps_loaded", "maps_stored"),
    [("moments", 1, 0), ("normalize", 1, 1), ("grad_moments", 2, 0), ("grad_input", 2, 1)],
)
def test_large_maps_dominate(name, maps_loaded, maps_stored, layout):
    """Of maps of 160 x 160, the table at the top holds to 1 % with everything counted: a program of
    a default config loads coefficients of a few channels, and a thousand elements or more. Maps of
    bfloat16 have the fewest bytes.
    """
    shape, dtype = (2, 4, 160, 160), torch.bfloat16
    traffic = measure(name, shape, layout, dtype, "default")
    tensor_bytes = math.prod(shape) * dtype.itemsize
    loaded = sum(int(count.sum()) for count in traffic.loads.values()) * dtype.itemsize
    stored = int(traffic.stores.sum()) * dtype.itemsize
    assert (loaded, stored) == (maps_loaded * tensor_bytes, maps_stored * tensor_bytes)
    beside = traffic.loaded_beside + traffic.stored_beside
    assert beside <= 0.01 * (maps_loaded + maps_stored) * tensor_bytes


@triton.jit
def copy_kernel(target, source, counter, FIRST: tl.constexpr, PRESENT: tl.constexpr):
    """Copy PRESENT elements from FIRST on, the first two of them once more."""
    lane = tl.arange(0, 16)
    value = tl.load(source + FIRST + lane, mask=lane < PRESENT, other=0.0)
    tl.store(target + lane, value, mask=lane < PRESENT)
    pair = tl.arange(0, 2)
    tl.store(target + pair, tl.load(source + FIRST + pair))
    tl.atomic_add(counter, 1)


def test_the_meter_counts_lanes_that_masks_let_through():
    source, target = torch.rand(12, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    counter = torch.tensor(0, dtype=torch.int32)
    with interpreter.metered() as meter:
        copy_kernel[(3,)](target, source, counter, FIRST=5, PRESENT=4)
    assert torch.equal(target[:4], source[5:9])
    assert meter.counts("load", source).tolist() == [0] * 5 + [6, 6, 3, 3] + [0] * 3
    assert meter.counts("store", target).tolist() == [6, 6, 3, 3] + [0] * 12
    assert meter.counts("load", counter.view(1)).tolist() == [3]
    assert meter.bytes("load") == meter.bytes("store") == 18 * 8 + 3 * 4


@pytest.mark.parametrize("first", [-1, 9])
def test_the_meter_raises_where_an_access_leaves_its_tensor(first):
    """The memory there is that of the storage, but not of the tensor."""
    source, target = torch.rand(20)[4:16], torch.zeros(16)
    counter = torch.tensor(0, dtype=torch.int32)
    with (
        interpreter.metered(),
        pytest.raises(Exception, match="load outside of every argument of the kernel"),
    ):
        copy_kernel[(1,)](target, source, counter, FIRST=first, PRESENT=4)
    assert not target.any()
