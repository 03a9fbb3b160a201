"""What a reduction reads last is what the writer after it reads first: it is still in the cache.

Programs are taken to start in the order of their numbers, as many at a time as fit, and those that
run at the same time to advance tile by tile.
"""

import os

import numpy as np
import pytest
import torch

from tests.support import interpreter
from tests.support.inputs import random
from tests.support.steps import kernel
from triton_syncbn import reference

pytest.importorskip("triton")

from triton_syncbn.kernels.launch_config import LaunchConfig

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def times_of_reading(launch, x, config, slots, monkeypatch) -> np.ndarray:
    """When each element of x is read, in the order of memory, between 0 and 1."""
    from triton.runtime.interpreter import InterpreterBuilder

    starts = []
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def start_program(self, *position):
        starts.append(len(meter.accesses))
        set_grid_idx(self, *position)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", start_program)
    with interpreter.metered() as meter:
        launch(config)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)

    times = np.full(x.numel(), np.nan)
    wave_start, wave_end = 0, 0
    first = x.data_ptr()
    for program, start in enumerate(starts):
        if program % slots == 0:
            wave_start = wave_end
        time = wave_start
        for kind, addresses, size in meter.accesses[start : [*starts, None][program + 1]]:
            offsets = (addresses - first) // size
            if kind != "load" or size != x.itemsize or not offsets.size:
                continue
            if offsets.min() >= 0 and offsets.max() < x.numel():
                times[offsets] = time
                time += 1
        wave_end = max(wave_end, time)
    assert not np.isnan(times).any()
    return times / wave_end


SLOTS = 16  # programs at a time


@pytest.mark.parametrize(
    ("shape", "layout", "reading", "writing"),
    [
        # channels are split, and all programs run at once
        ((8, 4, 128), "channels_first", LaunchConfig(1, 64, 4, 1), LaunchConfig(1, 64, 1, 1)),
        ((4, 8, 128), "channels_last", LaunchConfig(16, 8, 4, 1), LaunchConfig(16, 8, 4, 1)),
        ((4, 24, 128), "channels_last", LaunchConfig(16, 8, 4, 1), LaunchConfig(8, 8, 5, 1)),
    ],
    ids=str,
)
def test_a_writer_starts_where_the_reduction_ended(shape, layout, reading, writing, monkeypatch):
    device = torch.device("cpu")
    x = random(shape, torch.float32, device, layout)
    sums = reference.moments(x)
    read = times_of_reading(
        lambda config: kernel("moments", device)(x, config), x, reading, SLOTS, monkeypatch
    )
    written = times_of_reading(
        lambda config: kernel("normalize", device)(x, sums, None, None, eps=1e-5, config=config),
        *(x, writing, SLOTS, monkeypatch),
    )
    assert np.corrcoef(read, written)[0, 1] <= -0.85
    early = written <= np.quantile(written, 0.2)
    assert read[early].mean() >= 0.75
