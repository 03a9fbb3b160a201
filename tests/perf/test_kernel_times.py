"""perf/kernel_times.py: a row for each kernel, right, with its share of what a copy moves."""

import kernel_times
import pytest
import torch
from layers.cases import Case
from layers.steps import KERNELS

pytest.importorskip("triton")

BYTES_PER_SECOND = 1e9


def test_each_kernel_has_a_time_and_a_share_of_a_copy(monkeypatch):
    monkeypatch.setattr(kernel_times, "copy_bytes_per_second", lambda *_: BYTES_PER_SECOND)
    case = Case("tiny", "maps", (3, 5, 4, 8), "bf16", "channels_last")
    frame = kernel_times.measure([case], torch.device("cpu"), samples=1)
    assert tuple(frame.kernel) == KERNELS
    assert (frame.error_over_tolerance <= 1).all()
    moved = frame.kernel.map(kernel_times.MAPS_MOVED) * case.bytes
    assert (frame.copy_fraction * frame.us * 1e-6 * BYTES_PER_SECOND).tolist() == pytest.approx(
        moved.tolist()
    )


def test_large_layers_are_summed_up_and_small_ones_are_not():
    row = {"dtype": "fp32", "layout": "channels_first", "kernel": "moments"}
    frame = kernel_times.pd.DataFrame(
        [
            {**row, "shape": "2x64x128x128", "copy_fraction": 0.5},
            {**row, "shape": "4x64x128x128", "copy_fraction": 0.72},
            {**row, "shape": "2x64x8x8", "copy_fraction": 0.01},
        ]
    )
    assert "| fp32  | channels_first | 0.61    |" in kernel_times.summary(frame)
    assert kernel_times.summary(frame.tail(1)) == "No layer has 8 MB."
