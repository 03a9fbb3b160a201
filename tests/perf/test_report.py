"""What is shown of the rows: tables, Markdown, plots, and the README's block from a GPU alone."""

import sys

import pandas as pd
import pytest
from readme import filled
from report.plots import draw_speedups, figures_of, panel_of_each_pass, save
from report.tables import (
    COLUMNS,
    counts,
    frame_of,
    line_per_pass,
    means,
    notes,
    read_rows,
    report,
)

LAYERS = [("heads", "small head", "64x128"), ("edge", "odd channels", "8x37x61x43")]
MICROSECONDS = {
    "torch_syncbn": (300.0, 200.0),
    "torch_batchnorm": (20.0, 30.0),
    "triton_syncbn": (100.0, 50.0),
    "triton_syncbn_compiled": (75.0, 50.0),
}
README = "before\n<!-- compare -->\nPending.\n<!-- /compare -->\nafter\n"


def rows(gpu="Some GPU", wrong=(), impls=tuple(MICROSECONDS), dtypes=("fp32", "bf16")):
    """A run of two layers, as compare.py has it: times in microseconds are those above."""
    setting = {
        **{"timestamp_utc": "2030-01-01T00:00:00+00:00", "commit": "0123456789ab"},
        **{"dirty": False, "gpu": gpu, "driver": "550.10", "torch": "2.13"},
        **{"triton": "3.7", "cuda": "13", "nccl": "2.29", "world_size": 1, "config": "default"},
    }
    found = []
    for index, (suite, layer, shape) in enumerate(LAYERS):
        for dtype in dtypes:
            for impl in impls:
                row = {
                    **{"impl": impl, "pass": "both", "suite": suite, "layer": layer},
                    **{"shape": shape, "dtype": dtype, "layout": "channels_first", "block": "none"},
                    **{"timer": "device events, cold L2", "error_over_tolerance": 0.5},
                    "copy_bytes_per_s": 3.35e12 if gpu else None,
                }
                if impl in wrong:
                    row["error_over_tolerance"] = 7.0
                else:
                    us = MICROSECONDS[impl][index]
                    row |= {
                        **{"samples": 100, "us_p20": us, "us_p50": us, "us_p80": us},
                        **{"host_us": 40.0, "copy_fraction": 0.5 if gpu else None},
                        **{"launches": 4 + index, "host_syncs": 0, "collectives": 2},
                    }
                found.append(row)
    return frame_of(found, setting)


def test_rows_have_exactly_the_columns_and_empty_means_not_measured():
    frame = rows(wrong=("triton_syncbn",))
    assert tuple(frame.columns) == COLUMNS
    assert frame.peak_mb.isna().all()
    wrong = frame[frame.impl == "triton_syncbn"]
    assert wrong[["us_p50", "launches", "samples"]].isna().all().all()


def test_speedups_are_the_first_that_synchronizes_over_the_others():
    by_suite = means(rows(), ["suite"])
    assert by_suite["triton_syncbn"].to_dict() == pytest.approx({"heads": 3.0, "edge": 4.0})
    assert by_suite["torch_batchnorm"].to_dict() == pytest.approx({"heads": 15.0, "edge": 20 / 3})
    over_all = means(rows(), ["pass"])
    assert over_all.loc["both", "triton_syncbn"] == pytest.approx(12**0.5)
    assert over_all.loc["both", "triton_syncbn_compiled"] == pytest.approx(4.0)


def test_a_line_a_pass():
    assert line_per_pass(rows()).iloc[0].to_dict() == {
        **{"layer": "small head", "shape": "64x128", "dtype": "fp32", "pass": "both"},
        **{"torch_batchnorm": "20", "torch_syncbn": "300", "triton_syncbn": "100"},
        **{"triton_syncbn_compiled": "75", "x": "3.00", "copy %": "50", "host us": "40"},
    }


def test_what_is_wrong_has_fail_and_no_time():
    line = line_per_pass(rows(wrong=("triton_syncbn",))).iloc[0].to_dict()
    assert line["triton_syncbn"] == "FAIL 7e+00"
    assert line["x"] == line["copy %"] == "-"


def test_counts_are_the_most_of_all_layers_and_what_was_not_counted_is_left_out():
    seen = counts(rows()).set_index("counted")["triton_syncbn"]
    assert seen.to_dict() == {"launches": "5", "host_syncs": "0", "collectives": "2"}
    on_cpu = rows().assign(launches=pd.NA, host_syncs=pd.NA)
    assert counts(on_cpu).counted.tolist() == ["collectives"]


def test_bytes_by_formula_and_the_copy_roof_are_in_the_notes():
    told = "\n".join(notes(rows()))
    assert "forward 3T, backward 5T, both 8T" in told
    assert "3350.0 GB/s" in told
    assert "which does not synchronize: the bound" in told
    assert "4T and 1 bits an element" in "\n".join(notes(rows().assign(block="add_relu")))
    assert "copy" not in "\n".join(notes(rows(gpu=None)))


def test_of_one_implementation_there_are_times_alone():
    told = report(rows(impls=("torch_batchnorm",)))
    assert "small head" in told
    assert "times faster" not in told


def test_the_readme_is_filled_between_its_markers(tmp_path):
    text = filled(README, rows())
    assert text.startswith("before\n<!-- compare -->\n")
    assert text.endswith("\n<!-- /compare -->\nafter\n")
    assert "Pending" not in text
    assert "| fp32  | channels_first | both | 10.00           | 3.46 " in text
    assert "Some GPU, 1 rank" in text
    assert filled(text, rows()) == text
    rows().to_csv(tmp_path / "rows.csv", index=False, float_format="%.6g")
    assert filled(README, read_rows(tmp_path / "rows.csv")) == text


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (rows(gpu=None), "got a CPU's"),
        (rows(wrong=("triton_syncbn",)), "no wrong row"),
        (rows(impls=("torch_syncbn",)), "rows of ours"),
    ],
    ids=["CPU", "wrong", "ours is missing"],
)
def test_the_readme_is_refused_what_is_no_figure_of_a_gpu(frame, message):
    with pytest.raises(ValueError, match=message):
        filled(README, frame)


@pytest.mark.parametrize(("gpu", "names"), [(None, ["speedup"]), ("A", ["bandwidth", "speedup"])])
def test_plots_are_drawn(tmp_path, gpu, names):
    said = save(figures_of(rows(gpu=gpu)), tmp_path)
    files = [f"{name}_{dtype}_channels_first.png" for name in names for dtype in ("bf16", "fp32")]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    for file in files:
        assert file in said
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


def test_a_bar_for_each_implementation_stands_at_its_suite():
    (axes,) = panel_of_each_pass(rows(dtypes=("fp32",)), "title", draw_speedups).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["heads", "edge", "all layers"]
    names = [container.get_label() for container in axes.containers]
    assert names == ["torch_batchnorm", "triton_syncbn", "triton_syncbn_compiled"]
    assert [text.get_text() for text in axes.texts][3:6] == ["3", "4", "3.5"]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in axes.containers[1]]
    assert middles == pytest.approx([0, 1, 2])


def test_without_matplotlib_there_is_a_word_and_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in save(figures_of(rows()), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
