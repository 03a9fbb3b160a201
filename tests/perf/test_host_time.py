"""What the host's time is compared with: ratios of an earlier run."""

import pandas as pd
import pytest

pytest.importorskip("triton")

import host_time
from host_time import KEYS, LIBRARY, OURS, THEIRS, WORKS


def rows(ratios, layout="channels_first"):
    keys = [(layout, WORKS[0], layer) for layer in ratios]
    return pd.DataFrame(
        [(*key, 1.0, ratios[key[2]]) for key in keys], columns=[*KEYS, "us", "ratio"]
    )


def test_a_ratio_that_is_over_20_percent_worse_is_a_regression():
    before = rows({THEIRS: 1.0, OURS: 1.2, LIBRARY: 1.0})
    assert host_time.regressions(rows({THEIRS: 1.0, OURS: 1.43, LIBRARY: 1.19}), before) == []
    (line,) = host_time.regressions(rows({THEIRS: 1.0, OURS: 1.45, LIBRARY: 1.19}), before)
    assert line.endswith("training step, triton_syncbn: 1.45 of torch's, was 1.20")


def test_a_baseline_of_another_layout_is_an_error():
    with pytest.raises(ValueError, match="expected rows of the same layouts"):
        host_time.regressions(rows({OURS: 1.0}), rows({OURS: 1.0}, "channels_last"))


def test_the_ratio_is_to_torch_at_the_same_work_in_the_same_layout():
    turns = [
        host_time.Turn(layout, WORKS[0], layer, lambda: None)
        for layout in ("channels_first", "channels_last")
        for layer in (THEIRS, OURS)
    ]
    measured = host_time.measure(turns, repeats=3, rounds=2)
    theirs = measured.us[[0, 0, 2, 2]].to_numpy()
    assert (measured.ratio == measured.us / theirs).all()
