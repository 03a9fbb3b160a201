"""What the kernels of a layer would cost: their compiled instructions are executed on a CPU, on the
layer scaled down, and counted.
"""

import math
from typing import NamedTuple

import torch
from executor.launch import executed_instead_of_launched
from executor.trace import SECTOR, bank_conflicts, sectors
from layers.cases import DTYPES, Case, laid_out
from layers.steps import Operands, run_step
from triton_syncbn.kernels import combine
from triton_syncbn.kernels.indexing import Geometry, count_tiles, geometry
from triton_syncbn.kernels.launch_config import WRITERS, LaunchConfig, fit_splits

from triton_syncbn import reference

MAPS = ("input", "output", "grad_output", "grad_input")  # parameters of the kernels
MOST_ELEMENTS = 1 << 17  # of a layer as scaled down
FEWEST_ROWS = 8  # N * C stays a multiple, so that rows are read as vectors of 8 elements
CHANNELS_OF_BLOCK = 64  # channels last, at most: as many are left beside whole blocks as there were
FEWEST_CHANNELS = 256  # channels last


class Cost(NamedTuple):
    """Of one launch. Sectors that it takes are over those that the bytes of the maps fill, and over
    those that they touch: the row that a program reads for its channel alone touches more.
    """

    instructions: float  # by a thread, for each element
    sectors_of_bytes: float
    sectors_of_rows: float
    passes_of_banks: float  # over the least


def scaled_to_execute(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """A layer with fewer channels, samples and positions, whose rows in memory begin and end at the
    same places of a vector, or of a block of channels. Channels last, (N * S, C).
    """
    samples, channels, *sizes = shape
    is_matrix = math.prod(sizes) == 1
    if is_matrix or (layout == "channels_last" and channels > 1):  # one channel lies as rows
        if channels > 2 * FEWEST_CHANNELS:
            channels = FEWEST_CHANNELS + channels % CHANNELS_OF_BLOCK
        return (max(1, min(samples * math.prod(sizes), MOST_ELEMENTS // channels)), channels)
    while samples * channels * math.prod(sizes) > MOST_ELEMENTS:
        longest = sizes.index(max(sizes))
        halves = samples * channels % (2 * FEWEST_ROWS) == 0
        if channels >= 4 and (samples % FEWEST_ROWS == 0 or (halves and channels % 2 == 0)):
            channels //= 2  # but two stay: samples of a single channel would be one row
        elif halves and samples % 2 == 0:
            samples //= 2
        elif sizes[longest] >= 2 * FEWEST_ROWS:
            sizes[longest] = FEWEST_ROWS + sizes[longest] % FEWEST_ROWS
        else:
            break
    return (samples, channels, *sizes)


def _fitting(name: str, case: Case, config: LaunchConfig, small: Geometry) -> LaunchConfig:
    """The config of a case for the layer scaled down: programs that go around as often."""
    if name in WRITERS and not small.channels_last:
        return fit_splits(name, small, config)
    tiles = [
        count_tiles(shape, config.block_rows, config.block_columns)
        for shape in (small, geometry(case.without_memory()))
    ]
    splits = max(config.splits * tiles[0] // tiles[1], 1)
    return fit_splits(name, small, config._replace(splits=splits))


def _touched(size: int, row: int) -> int:
    """Sectors that rows of so many bytes touch, each for itself, in memory of that size."""
    begins = torch.arange(0, size, row)
    return int(((begins + row - 1) // SECTOR - begins // SECTOR + 1).sum())


def cost_of(name: str, case: Case, config: LaunchConfig, capability: int) -> Cost:
    """Of a kernel launched on a case, scaled down, with the config of the case itself."""
    shape = scaled_to_execute(case.shape, case.layout)
    generator = torch.Generator().manual_seed(0)
    input, grad = (
        laid_out(torch.randn(shape, generator=generator).to(DTYPES[case.dtype]), case.layout)
        for _ in range(2)
    )
    moments = reference.moments(input)
    ones = torch.ones(shape[1])
    operands = Operands(
        *(input, grad, moments, moments[:-1], ones, ones, ones.clone(), ones.clone()),
        num_batches_tracked=torch.tensor(0),
    )
    small = geometry(input)
    config = _fitting(name, case, config, small)
    combine._kept.clear()  # may be those of tensors without memory
    with executed_instead_of_launched(capability) as launches:
        run_step(name, operands, config=config)
    (launch,) = launches
    machine = launch.machine
    assert machine is not None
    maps = [region for region in machine.memory.regions if region.name in MAPS]
    taken = sum(map(sectors, maps)) / len(maps)
    in_rows = not small.channels_last and name not in WRITERS
    shared = bank_conflicts(machine.shared)
    return Cost(
        machine.executed.sum() / input.numel(),
        taken / (input.nbytes / SECTOR),
        taken / _touched(input.nbytes, small.columns * input.itemsize if in_rows else input.nbytes),
        shared.taken / shared.least if shared.least else 1.0,
    )
