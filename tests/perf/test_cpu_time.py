"""perf/cpu_time.py: of several processes the middle, and its goals."""

from concurrent.futures import ThreadPoolExecutor

import cpu_time
import pytest
from cpu_time import COMPARISONS, ROUNDS, SHAPES, Row, summary

ALONE = next(each for each in COMPARISONS if each.ranks == 1 and each.goal_of_rows == 3.0)


def test_a_row_is_the_middle_of_new_processes(monkeypatch):
    found = iter([5.0, 1.0, 3.0])

    def measure(place, comparison, samples):
        assert (place, comparison, samples) == (None, ALONE, 7)
        ours = next(found)
        return [Row(shape, 1.0, ours) for shape in SHAPES]

    monkeypatch.setattr(cpu_time, "measure", measure)
    monkeypatch.setattr(cpu_time, "ProcessPoolExecutor", lambda number, how: ThreadPoolExecutor(1))
    rows = cpu_time.middle(ALONE, 7)
    assert ROUNDS == 3
    assert [(row.shape, row.ratio) for row in rows] == [(shape, 3.0) for shape in SHAPES]


@pytest.mark.parametrize(
    ("ours", "reached", "says"),
    [
        ((1.0, 2.25), True, "geometric mean 1.50 (at most 1.5: reached), largest 2.25"),
        ((1.0, 4.0), False, "geometric mean 2.00 (at most 1.5: MISSED), largest 4.00"),
        ((0.5, 3.5), False, "geometric mean 1.32 (at most 1.5: reached), largest 3.50"),
    ],
)
def test_a_mean_and_a_row_may_miss_their_goals(ours, reached, says):
    rows = [Row(SHAPES[0], 1.0, each) for each in ours]
    line, is_reached = summary(ALONE, rows)
    assert is_reached is reached
    assert line.startswith(says)


@pytest.mark.parametrize(
    "arguments", [["--ranks", "2", "--mean-over-std", "10000"], ["--samples", "0"]], ids=str
)
def test_nothing_to_measure_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu_time.main(arguments)
    assert stopped.value.code == 2
    assert "at least one sample" in capsys.readouterr().err
