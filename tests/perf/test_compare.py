"""The comparison: what is wrong gets no time, and every number is in the file."""

import os
import re
import subprocess
import sys

import compare
import pandas as pd
import pytest
import torch
from layers import cases
from layers.implementations import IMPLEMENTATIONS, Implementation, implementations
from machine import ranks
from measuring import rows, scale
from report.tables import COLUMNS

import triton_syncbn


@pytest.fixture
def run_alone(monkeypatch, plain_torch):
    """Makes the comparison in this process, of a small layer, and returns its exit status."""
    monkeypatch.setattr(ranks, "CPU_RANKS", 1)
    return lambda *arguments: compare.main(
        ["--suite", "edge", "--samples", "2", *map(str, arguments)]
    )


@pytest.mark.parametrize("block", ["relu", "add_relu"])
def test_blocks_are_compared_whole(block, run_alone, tmp_path):
    file = tmp_path / "rows.csv"
    assert run_alone("--block", block, "--dtype", "fp32", "bf16", "--csv", file) == 0
    frame = pd.read_csv(file)
    assert set(frame.block) == {block}
    assert (frame.error_over_tolerance <= 1).all()
    assert set(frame.impl) == set(implementations(torch.device("cpu")))


def test_rows_are_kept_as_they_come(run_alone, tmp_path, monkeypatch):
    """What was measured until somebody stops it."""
    file = tmp_path / "rows.csv"
    figures_of, seen = rows.figures_of, []

    def until_stopped(place, calls, plan):
        if seen:
            raise KeyboardInterrupt
        seen.append(len(calls))
        return figures_of(place, calls, plan)

    monkeypatch.setattr(rows, "figures_of", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        run_alone("--dtype", "fp32", "bf16", "--csv", file)
    kept = pd.read_csv(file)
    assert len(kept) == seen[0] > 0
    assert (kept.us_p50 > 0).all()


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
    assert tuple(rows.columns) == COLUMNS
    gpu = torch.cuda.is_available()
    names = implementations(torch.device("cuda" if gpu else "cpu"))
    cases_of_edge = 3 * 2 * 2 if gpu else 2  # layers, dtypes and layouts
    assert len(rows) == cases_of_edge * len(cases.PASSES) * len(names)
    assert (rows.error_over_tolerance <= 1).all()
    assert (rows.us_p50 > 0).all()
    assert ((rows.us_p20 <= rows.us_p50) & (rows.us_p50 <= rows.us_p80)).all()
    assert (rows.host_us > 0).all()
    for column in ("copy_fraction", "peak_mb", "launches", "host_syncs"):
        assert rows[column].notna().all() == gpu
    ours = rows[(rows.impl == "triton_syncbn") & (rows["pass"] != "both")]
    assert (ours.collectives == 1).all()
    assert "FAIL" not in seen
    assert file.with_suffix(".md").read_text() in f"{seen}\n"
    assert len(list((tmp_path / "plots").glob("*.png"))) == (8 if gpu else 2)
    if not gpu:
        assert re.search(
            r"odd channels +\| 1x37x16x11 \| bf16 +\| both +(\| \d+ +){4}\| \d+\.\d\d", seen
        )
        assert re.search(r"fp32 +\| channels_first +\| both +(\| \d+\.\d\d +){3}", seen)


class Biased(triton_syncbn.SyncBN):
    """Wrong by 1%."""

    def forward(self, input):
        return super().forward(input) * 1.01


def compared(monkeypatch, **classes):
    """Compare these layers, and nothing else."""
    for name in list(IMPLEMENTATIONS):
        monkeypatch.delitem(IMPLEMENTATIONS, name)
    for name, layer_class in classes.items():
        found = Implementation(layer_class, "a note", compiled=layer_class is broken)
        monkeypatch.setitem(IMPLEMENTATIONS, name, found)


def broken(channels):
    raise RuntimeError("the compiler says no\nand more")


def test_a_wrong_implementation_has_no_time(tmp_path, capsys, monkeypatch, run_alone):
    compared(monkeypatch, gather_syncbn=triton_syncbn.SyncBN, triton_syncbn=Biased)
    file = tmp_path / "rows.csv"
    assert run_alone("--csv", file) == 1
    seen = pd.read_csv(file)
    wrong = seen[seen.impl == "triton_syncbn"]
    assert (wrong.error_over_tolerance > 100).all()
    assert wrong.us_p50.isna().all()
    assert seen[seen.impl == "gather_syncbn"].us_p50.notna().all()
    assert re.search(r"odd channels .* FAIL 1e\+03 ", capsys.readouterr().out)


def test_what_cannot_be_made_is_left_out_with_a_word(tmp_path, monkeypatch, run_alone):
    compared(monkeypatch, gather_syncbn=triton_syncbn.SyncBN, triton_syncbn_compiled=broken)
    file = tmp_path / "rows.csv"
    with pytest.warns(UserWarning, match="^triton_syncbn_compiled is left out: .* says no$"):
        assert run_alone("--csv", file) == 0
    assert set(pd.read_csv(file).impl) == {"gather_syncbn"}


def test_a_slower_row_ends_with_1(tmp_path, capsys, run_alone):
    file, before = tmp_path / "rows.csv", tmp_path / "before.csv"
    chosen = ("--impl", "torch_batchnorm")
    assert run_alone(*chosen, "--csv", file) == 0
    rows = pd.read_csv(file)
    times = ["us_p20", "us_p50", "us_p80"]
    rows.assign(**rows[times] * 1e-6).to_csv(before, index=False)
    assert run_alone(*chosen, "--baseline", before) == 1
    assert "3 rows are slower than the baseline by more than 5%" in capsys.readouterr().out
    rows.assign(**rows[times] * 1e6).to_csv(before, index=False)
    assert run_alone(*chosen, "--baseline", before) == 0


def test_a_baseline_of_another_gpu_ends_the_command_at_once(tmp_path):
    file = tmp_path / "rows.csv"
    pd.DataFrame(columns=list(COLUMNS), data=[["Other GPU"] * len(COLUMNS)]).to_csv(file)
    done = subprocess.run(
        [sys.executable, compare.__file__, "--baseline", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("--baseline: another gpu: expected ")
    assert "got Other GPU" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuda-graph"], "--cuda-graph: expected a GPU, found none"),
        (["--impl", "torch_syncbn"], "invalid choice: 'torch_syncbn'"),
        (["--model", "resnet50", "--dtype", "fp64"], "--dtype: a network trains in fp32 or bf16"),
    ],
    ids=lambda value: value[0],
)
def test_what_cannot_be_run_here_is_refused(options, message, capsys, plain_torch):
    with pytest.raises(SystemExit):
        compare.parse(options)
    assert message in capsys.readouterr().err


def test_every_layer_of_the_list_is_a_case():
    every = cases.read_cases(cases.suites(), ["fp32", "bf16"], list(cases.LAYOUTS))
    assert len({case.layer for case in every}) == 32
    flat = [case for case in every if len(case.shape) == 2]
    assert {case.layout for case in flat} == {"channels_first"}
    assert len(every) == 2 * (2 * 32 - len({case.layer for case in flat}))


def test_on_a_cpu_every_suite_has_a_layer():
    on_cpu = cases.read_cases(cases.suites(), ["fp32"], ["channels_first"], on_cpu=True)
    assert {case.suite for case in on_cpu} == set(cases.suites())
    everything = cases.read_cases(cases.suites(), ["fp32"], ["channels_first"])
    channels = {case.layer: case.shape[1] for case in everything}
    assert all(case.shape[1] == channels[case.layer] for case in on_cpu)


def test_bytes_are_counted_by_the_formula():
    case = cases.Case("suite", "layer", (2, 3, 5, 7), "bf16", "channels_last")
    assert case.bytes == 2 * 3 * 5 * 7 * 2
    for block, forward, backward in (
        ("none", 3, 5),
        ("relu", 3, 5),
        ("add_relu", 4 + 1 / 16, 6 + 1 / 8),
    ):
        found = case._replace(block=block)
        assert found.bytes_of_pass("forward") == forward * case.bytes
        assert found.bytes_of_pass("backward") == backward * case.bytes
        assert found.bytes_of_pass("both") == (forward + backward) * case.bytes


def test_scale_is_a_table_a_file_and_a_picture(tmp_path, capsys):
    arguments = ["--scale", "--csv", f"{tmp_path}/scale.csv", "--plots", str(tmp_path)]
    assert compare.main(arguments) == 0
    table = pd.read_csv(tmp_path / "scale.csv")
    assert list(table.ranks) == [2**power for power in range(1, 13)]
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    seen = capsys.readouterr().out
    # 2 x 512 + 1 numbers: 4095 other ranks x 4 bytes; 2 x 4095/4096 x 8 bytes
    assert re.search(r"4,096 +\| 16,789,500 +\| 16,396", seen)
    assert "by formula" in seen


@pytest.mark.parametrize(
    ("world_size", "channels", "gathered", "reduced"),
    [
        # 129 numbers: 1 other rank x 129 x 4 bytes; 2 x 1/2 x 129 x 8 bytes
        (2, 64, 516, 1032),
        # 4097 numbers: 255 other ranks x 4097 x 4 bytes; 2 x 255/256 x 4097 x 8 bytes
        (256, 2048, 4_178_940, 65_295.9375),
    ],
)
def test_bytes_of_a_rank_are_those_worked_out_by_hand(world_size, channels, gathered, reduced):
    assert scale.gather_bytes(world_size, channels) == gathered
    assert scale.all_reduce_bytes(world_size, channels) == reduced
