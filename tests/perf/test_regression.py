"""A regression is a median that is slower than allowed and no noise; other machines are refused."""

import pandas as pd
import pytest
from report.regression import check_comparable, describe, regressions

SETTING = {
    **{"gpu": "Some GPU", "world_size": 1, "driver": "1.10", "torch": "2", "triton": "3"},
    **{"cuda": "4", "nccl": None, "config": "default"},
}


def rows(us_p20, us_p50, us_p80, layer="stem", **other):
    """One row of a run."""
    row = {
        **{"impl": "triton_syncbn", "pass": "forward", "suite": "heads", "layer": layer},
        **{
            "shape": "8x4",
            "dtype": "fp32",
            "layout": "channels_first",
            "block": "none",
            "timer": "host clock",
        },
        **{"us_p20": us_p20, "us_p50": us_p50, "us_p80": us_p80},
    }
    return pd.DataFrame([{**row, **SETTING, **other}])


BEFORE = rows(98.0, 100.0, 102.0)


@pytest.mark.parametrize(
    ("now", "regression"),
    [
        (rows(105.0, 110.0, 115.0), True),
        (rows(102.1, 105.1, 108.0), True),
        (rows(102.1, 104.9, 108.0), False),
        (rows(101.9, 110.0, 115.0), False),
        (rows(80.0, 85.0, 90.0), False),
        (rows(float("nan"), float("nan"), float("nan")), False),
    ],
    ids=["slower", "just slower", "within 5%", "within the noise", "faster", "wrong, no time"],
)
def test_slower_by_more_than_allowed_and_above_the_noise(now, regression):
    slower = regressions(now, BEFORE, 5.0)
    assert len(slower) == regression
    assert ("triton_syncbn | stem" in describe(slower, 5.0)) == regression


def test_the_allowance_is_what_was_asked_for():
    now = rows(105.0, 110.0, 115.0)
    assert len(regressions(now, BEFORE, 9.9)) == 1
    assert regressions(now, BEFORE, 10.1).empty


def test_rows_are_held_against_the_same_layer():
    now = pd.concat([rows(98.0, 100.0, 102.0), rows(200.0, 200.0, 200.0, layer="other")])
    assert regressions(now, BEFORE, 5.0).empty
    with pytest.raises(ValueError, match="got none"):
        regressions(rows(1.0, 1.0, 1.0, layer="other"), BEFORE, 5.0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("gpu", "Other GPU", "another gpu: expected Other GPU, got Some GPU"),
        ("gpu", None, "another gpu: expected none, got Some GPU"),
        ("world_size", 8, "another world_size: expected 8, got 1"),
    ],
)
def test_another_machine_is_refused(column, value, message):
    with pytest.raises(ValueError, match=message):
        check_comparable(BEFORE, {**SETTING, column: value})


def test_other_versions_are_warned_of(recwarn):
    check_comparable(BEFORE, SETTING)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="^the baseline has another triton: expected 3.1, got 3$"):
        check_comparable(BEFORE, {**SETTING, "triton": "3.1"})
