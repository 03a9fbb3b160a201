"""What is shown of the rows: tables, Markdown, plots, and the README's block from a GPU alone."""

import sys

import pandas as pd
import pytest
from readme import write_block
from report.markdown import means_by_suite, summary
from report.plots import draw_speedups, write_plots
from report.tables import (
    COLUMNS,
    counts,
    footnotes,
    frame_of_layers,
    geometric_means,
    line_per_layer,
    read_rows,
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
        **{"dirty": False, "gpu": gpu, "gpu_count": 1, "driver": "550.10", "torch": "2.13"},
        **{"triton": "3.7", "cuda": "13", "nccl": "2.29", "world_size": 1, "config": "default"},
    }
    found = []
    for index, (suite, layer, shape) in enumerate(LAYERS):
        for dtype in dtypes:
            for impl in impls:
                row = {
                    **{"impl": impl, "pass": "both", "suite": suite, "layer": layer},
                    **{"shape": shape, "dtype": dtype, "layout": "channels_first"},
                    **{"timer": "device events, cold L2", "error_over_tolerance": 0.5},
                }
                if impl in wrong:
                    row["error_over_tolerance"] = 7.0
                else:
                    us = MICROSECONDS[impl][index]
                    row |= {
                        **{"samples": 100, "us_p20": us, "us_p50": us, "us_p80": us},
                        **{"host_us": 40.0, "gbytes_per_s": 1000.0, "copy_fraction": 0.5},
                        **{"launches": 4 + index, "host_syncs": 0, "collectives": 2},
                    }
                found.append(row)
    return frame_of_layers(found, setting)


def test_rows_have_exactly_the_columns_and_empty_means_not_measured():
    frame = rows(wrong=("triton_syncbn",))
    assert tuple(frame.columns) == COLUMNS
    assert frame.peak_mb.isna().all()
    wrong = frame[frame.impl == "triton_syncbn"]
    assert wrong[["us_p50", "launches", "samples"]].isna().all().all()


def test_speedups_are_the_first_implementation_over_ours():
    means = geometric_means(rows(), ["suite"])
    assert means["triton_syncbn"].to_dict() == pytest.approx({"heads": 3.0, "edge": 4.0})
    over_all = geometric_means(rows(), ["pass"])
    assert over_all.loc["both", "triton_syncbn"] == pytest.approx(12**0.5)
    assert over_all.loc["both", "triton_syncbn_compiled"] == pytest.approx(4.0)
    lines = means_by_suite(rows())
    assert lines.iloc[0].tolist() == [
        *("triton_syncbn", "fp32", "channels_first", "both", "3.00", "4.00", "3.46")
    ]


def test_a_line_a_layer():
    line = line_per_layer(rows()).iloc[0].to_dict()
    assert line["torch_syncbn us"] == "300"
    assert line["x both"] == "3.00"
    assert line["x both compiled"] == "4.00"
    assert line["copy %"] == "50"
    assert line["host us"] == "40"


def test_what_is_wrong_has_fail_and_no_time():
    frame = rows(wrong=("triton_syncbn",))
    line = line_per_layer(frame).iloc[0].to_dict()
    assert line["triton_syncbn us"] == "FAIL"
    assert line["x both"] == line["copy %"] == "-"
    assert "FAIL: triton_syncbn is wrong on odd channels, bf16" in summary(frame, 2e12)


def test_counts_are_shown_over_all_layers():
    ours = counts(rows()).set_index("impl").loc["triton_syncbn"]
    assert ours[["launches", "host syncs", "collectives"]].tolist() == ["4 to 5", "0", "2"]


def test_bytes_by_formula_and_the_copy_roof_are_in_the_footer():
    notes = "\n".join(footnotes(rows(), 3.35e12))
    assert "forward 3T, backward 5T, both 8T" in notes
    assert "Copy roof: 3350.0 GB/s" in notes
    assert "called directly" in notes
    assert "operators that compute" in "\n".join(footnotes(rows(gpu=None), 1e10))


def test_the_readme_is_filled_between_its_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(README)
    write_block(rows(), file)
    text = file.read_text()
    assert text.startswith("before\n<!-- compare -->\n")
    assert text.endswith("\n<!-- /compare -->\nafter\n")
    assert "Pending" not in text
    assert "| triton_syncbn | fp32 | channels_first | both | 3.00 | 4.00 | 3.46 |" in text
    assert "Some GPU, 1 rank" in text
    write_block(rows(), file)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("frame", "text", "message"),
    [
        (rows(gpu=None), README, "got a CPU's"),
        (rows(wrong=("triton_syncbn",)), README, "no wrong row"),
        (rows(impls=("torch_syncbn",)), README, "rows of ours"),
        (rows(), "no markers", "once"),
    ],
    ids=["CPU", "wrong", "ours is missing", "no markers"],
)
def test_the_readme_is_refused_what_is_no_figure_of_a_gpu(tmp_path, frame, text, message):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        write_block(frame, file)
    assert file.read_text() == text


@pytest.mark.parametrize("dtypes", [("fp32",), ("fp32", "bf16")], ids=len)
def test_plots_are_drawn(tmp_path, dtypes):
    said = write_plots(rows(dtypes=dtypes), tmp_path / "plots")
    for name in ("bandwidth.png", "speedup.png"):
        assert name in said
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_bars_stand_at_their_suite_in_every_panel():
    """A suite of layers without spatial dimensions has one layout only."""
    both = rows(dtypes=("fp32",))
    edge = both[both.suite == "edge"].assign(layout="channels_last")
    figure = draw_speedups(pd.concat([both, edge], ignore_index=True))
    first, last = figure.axes[0], figure.axes[2]
    assert [label.get_text() for label in last.get_xticklabels()] == ["heads", "edge"]
    assert [text.get_text() for text in first.texts] == ["3.00", "4.00"]
    assert [text.get_text() for text in last.texts] == ["", "4.00"]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in last.patches] == [0, 1]


def test_without_matplotlib_there_is_a_word_and_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in write_plots(rows(), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_rows_read_from_a_file_fill_the_readme_as_well(tmp_path):
    rows().to_csv(tmp_path / "rows.csv", index=False, float_format="%.6g")
    texts = []
    for frame in (rows(), read_rows(tmp_path / "rows.csv")):
        file = tmp_path / "README.md"
        file.write_text(README)
        write_block(frame, file)
        texts.append(file.read_text())
    assert texts[0] == texts[1]
