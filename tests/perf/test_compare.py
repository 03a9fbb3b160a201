"""The comparison: what is wrong gets no time, and every number is in the file."""

import functools
import os
import re
import subprocess
import sys

import compare
import pandas as pd
import pytest
import torch
from layers import cases, implementations
from machine import ranks
from measuring import passes, scale
from models.table import frame_of_models

import triton_syncbn

COLUMNS = [
    *("schema", "timestamp_utc", "commit", "dirty", "gpu", "gpu_count", "driver", "torch"),
    *("triton", "cuda", "nccl", "impl", "pass", "dtype", "layout", "suite", "layer", "shape"),
    *("world_size", "timer", "samples", "us_p20", "us_p50", "us_p80", "host_us", "gbytes_per_s"),
    *("copy_fraction", "peak_mb", "launches", "host_syncs", "collectives"),
    *("error_over_tolerance", "config"),
]


@pytest.fixture
def run_alone(monkeypatch, plain_torch):
    """Makes the comparison in this process, of three small layers, and returns its exit status."""
    monkeypatch.setattr(ranks, "CPU_RANKS", 1)
    return lambda *arguments: compare.main(
        ["--suite", "edge", "--samples", "2", *map(str, arguments)]
    )


@pytest.mark.slow
def test_the_command_ends_with_tables_and_files(tmp_path):
    """On this machine: two processes on a CPU, or its GPU."""
    file = tmp_path / "results" / "rows.csv"
    done = subprocess.run(
        [
            *(sys.executable, compare.__file__, "--suite", "edge", "--dtype", "fp32", "bf16"),
            *("--samples", "3", "--csv", str(file), "--plots", str(tmp_path / "plots")),
        ],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    seen = done.stdout
    rows = pd.read_csv(file)
    assert list(rows.columns) == COLUMNS
    gpu = torch.cuda.is_available()
    names = implementations.implementations(torch.device("cuda" if gpu else "cpu"))
    layers = 3 * 2 * (1 + gpu)  # both layouts on a GPU
    assert len(rows) == layers * len(passes.PASSES) * len(names)
    assert (rows.error_over_tolerance <= 1).all()
    assert (rows.us_p50 > 0).all()
    assert ((rows.us_p20 <= rows.us_p50) & (rows.us_p50 <= rows.us_p80)).all()
    assert (rows.host_us > 0).all()
    assert (rows.copy_fraction > 0).all()
    assert rows.peak_mb.notna().all() == gpu
    ours = rows[(rows.impl == "triton_syncbn") & (rows["pass"] != "both")]
    assert (ours.launches == 2).all()
    assert (ours.collectives == 1).all()
    assert "Geometric mean" in seen
    assert "FAIL" not in seen
    assert file.with_suffix(".md").read_text().startswith("# SyncBN compared")
    assert len(list((tmp_path / "plots").glob("*.png"))) == 2
    if not gpu:
        assert re.search(r"odd channels +1x37x16x11 +bf16( +\d+){3}( +\d+\.\d\d){3}", seen)
        assert "torch.nn.SyncBatchNorm refuses CPU tensors" in seen


class Biased(triton_syncbn.SyncBN):
    """Wrong by 1%."""

    def forward(self, input):
        return super().forward(input) * 1.01


def registered(monkeypatch, **table):
    """Compare these, and nothing else."""
    monkeypatch.setattr(implementations, "REGISTERED", {})
    for name, make in table.items():
        traits = {"may_fail": make is broken}
        implementations.implementation(name, **traits)(make)


def broken(channels):
    raise RuntimeError("the compiler says no\nand more")


def test_a_wrong_implementation_has_no_time(tmp_path, capsys, monkeypatch, run_alone):
    registered(monkeypatch, gather_syncbn=triton_syncbn.SyncBN, triton_syncbn=Biased)
    file = tmp_path / "rows.csv"
    assert run_alone("--csv", file) == 1
    rows = pd.read_csv(file)
    wrong = rows[rows.impl == "triton_syncbn"]
    assert (wrong.error_over_tolerance > 100).all()
    assert wrong.us_p50.isna().all()
    assert rows[rows.impl == "gather_syncbn"].us_p50.notna().all()
    seen = capsys.readouterr().out
    assert "FAIL: triton_syncbn is wrong on three channels" in seen
    assert re.search(r"three channels .* FAIL", seen)


def test_what_cannot_be_made_is_left_out_with_a_word(tmp_path, capsys, monkeypatch, run_alone):
    registered(monkeypatch, gather_syncbn=triton_syncbn.SyncBN, triton_syncbn_compiled=broken)
    file = tmp_path / "rows.csv"
    assert run_alone("--csv", file) == 0
    assert set(pd.read_csv(file).impl) == {"gather_syncbn"}
    seen = capsys.readouterr().out
    assert seen.count("Left out: triton_syncbn_compiled: ") == 1
    assert "RuntimeError: the compiler says no\n" in seen


def test_a_slower_row_ends_with_1(tmp_path, capsys, run_alone):
    file, before = tmp_path / "rows.csv", tmp_path / "before.csv"
    chosen = ("--impl", "torch_batchnorm")
    assert run_alone(*chosen, "--csv", file) == 0
    rows = pd.read_csv(file)
    times = ["us_p20", "us_p50", "us_p80"]
    rows.assign(**rows[times] * 1e-6).to_csv(before, index=False)
    assert run_alone(*chosen, "--baseline", before) == 1
    assert "9 rows are slower by more than 5%" in capsys.readouterr().out
    rows.assign(**rows[times] * 1e6).to_csv(before, index=False)
    assert run_alone(*chosen, "--baseline", before) == 0


def test_a_baseline_of_another_gpu_ends_the_command_at_once(tmp_path):
    file = tmp_path / "rows.csv"
    pd.DataFrame(columns=COLUMNS, data=[["Other GPU"] * len(COLUMNS)]).to_csv(file)
    done = subprocess.run(
        [sys.executable, compare.__file__, "--baseline", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("--baseline: another GPU: expected ")
    assert "got Other GPU" in done.stderr


@pytest.mark.parametrize("option", ["--cuda-graph", "--warm-cache"])
def test_what_needs_a_gpu_is_refused_without_one(option, capsys, plain_torch):
    with pytest.raises(SystemExit):
        compare.parse([option])
    assert f"{option}: expected a GPU, found none" in capsys.readouterr().err


def test_every_layer_of_the_list_is_a_case():
    every = cases.read_cases(cases.suites(), ["fp32", "bf16"], list(cases.LAYOUTS))
    assert len({case.layer for case in every}) == 32
    flat = [case for case in every if len(case.shape) == 2]
    assert {case.layout for case in flat} == {"channels_first"}
    assert len(every) == 2 * (2 * 32 - len({case.layer for case in flat}))


@pytest.mark.parametrize(
    ("shape", "smaller"),
    [
        ((32, 64, 112, 112), (4, 64, 28, 28)),
        ((2, 256, 1, 1), (2, 256, 1, 1)),
        ((2, 320, 8, 8, 8), (1, 320, 2, 2, 2)),
        ((64, 128), (8, 128)),
        # to 2**18 values, of whichever size is the largest
        ((4096, 8192), (32, 8192)),
        ((32, 1024, 4096), (4, 1024, 64)),
        ((2, 2048, 97, 97), (1, 2048, 7, 13)),
    ],
    ids=str,
)
def test_layers_are_scaled_down_by_what_the_report_says(shape, smaller):
    assert cases.scaled_down(shape) == smaller


def test_bytes_are_counted_by_the_formula():
    case = cases.Case("suite", "layer", (2, 3, 5, 7), "bf16", "channels_last")
    assert case.bytes == 2 * 3 * 5 * 7 * 2
    assert passes.TRANSFERS == {"forward": 3, "backward": 5, "both": 8}


def test_scale_is_a_table_a_file_and_a_picture(tmp_path, capsys, monkeypatch):
    small = functools.partial(scale.scale_table, channels=(64,), world_sizes=(2, 4))
    monkeypatch.setattr(compare, "scale_table", small)
    arguments = ["--scale", "--samples", "2", "--csv", f"{tmp_path}/scale.csv", "--plots"]
    assert compare.main([*arguments, str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "scale.csv")
    assert list(rows.world_size) == [2, 4]
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    seen = capsys.readouterr().out
    assert "all_reduce_finish_us" in seen
    assert "by formula" in seen


@pytest.mark.parametrize(("error", "status"), [(0.5, 0), (3.0, 1)])
def test_models_are_rows_with_their_setting_and_a_wrong_one_ends_with_1(
    error, status, tmp_path, capsys, monkeypatch, plain_torch
):
    def measure_model(place, name, dtype, layout, samples):
        row = {"model": name, "impl": "triton_syncbn", "error_over_tolerance": error}
        return frame_of_models([{**row, "dtype": dtype, "shape": "2x3", "world_size": 1}])

    monkeypatch.setattr(ranks, "CPU_RANKS", 1)
    monkeypatch.setattr(compare, "measure_model", measure_model)
    file = tmp_path / "models.csv"
    assert compare.main(["--model", "resnet50", "unet3d", "--csv", str(file)]) == status
    rows = pd.read_csv(file)
    assert list(rows.model) == ["resnet50", "unet3d"]
    assert {"commit", "torch", "gpu"} <= set(rows.columns)
    assert ("FAIL" in capsys.readouterr().out) == bool(status)
