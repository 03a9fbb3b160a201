"""The report: what is wrong gets no time, and every number is in the file."""

import math
import os
import re
import subprocess
import sys

import cases
import compare
import implementations
import measure
import pandas as pd
import pytest
import torch
import torch.distributed as dist

import triton_syncbn
from triton_syncbn import ops

COLUMNS = {
    *("schema", "timestamp_utc", "commit", "dirty", "gpu", "world_size", "torch", "triton", "cuda"),
    *("impl", "pass", "dtype", "layout", "suite", "layer", "shape", "timer", "samples"),
    *("us_p20", "us_p50", "us_p80", "gbytes_per_s", "error_over_tolerance"),
}


@pytest.fixture
def plain_torch(monkeypatch):
    """This process computes as users' do: without the interpreter, which is a thousand times
    slower.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    ops._step.cache_clear()
    yield
    ops._step.cache_clear()


def test_the_command_ends_with_a_table_and_a_file(tmp_path):
    """On this machine: two processes on a CPU, or its GPU."""
    file = tmp_path / "results" / "rows.csv"
    done = subprocess.run(
        [
            *(sys.executable, compare.__file__, "--suite", "edge", "--dtype", "fp32", "bf16"),
            *("--samples", "3", "--csv", str(file)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    seen = done.stdout
    rows = pd.read_csv(file)
    assert set(rows.columns) == COLUMNS
    names = implementations.implementations(torch.device("cpu"))
    assert len(rows) == 3 * 2 * len(measure.PASSES) * len(names)
    assert (rows.error_over_tolerance <= 1).all()
    assert (rows.us_p50 > 0).all()
    assert ((rows.us_p20 <= rows.us_p50) & (rows.us_p50 <= rows.us_p80)).all()
    assert re.search(r"odd channels +1x37x16x11 +bf16( +\d+){3}( +\d+\.\d\d){3}", seen)
    assert "Geometric mean" in seen
    assert "FAIL" not in seen
    if not torch.cuda.is_available():
        assert "torch.nn.SyncBatchNorm refuses CPU tensors" in seen


class Biased(triton_syncbn.SyncBN):
    """Wrong by 1%."""

    def forward(self, input):
        return super().forward(input) * 1.01


def test_a_wrong_implementation_has_no_time(tmp_path, capsys, monkeypatch, plain_torch):
    table = {"gather_syncbn": triton_syncbn.SyncBN, "triton_syncbn": Biased}
    monkeypatch.setattr(compare, "implementations", lambda device: table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "rows.csv"
    options = compare.parse(["--suite", "edge", "--samples", "2", "--csv", str(file)])
    assert compare.compare(0, 1, f"file://{tmp_path}/store", options) == 1
    rows = pd.read_csv(file)
    wrong = rows[rows.impl == "triton_syncbn"]
    assert (wrong.error_over_tolerance > 100).all()
    assert wrong.us_p50.isna().all()
    assert rows[rows.impl == "gather_syncbn"].us_p50.notna().all()
    seen = capsys.readouterr().out
    assert "FAIL: triton_syncbn is wrong on three channels" in seen
    assert re.search(r"three channels .* FAIL", seen)


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
    ],
    ids=str,
)
def test_layers_are_scaled_down_by_what_the_report_says(shape, smaller):
    assert cases.scaled_down(shape, compare.CPU_FACTOR) == smaller


def test_bytes_are_counted_by_the_formula():
    case = cases.Case("suite", "layer", (2, 3, 5, 7), "bf16", "channels_last")
    assert case.bytes == 2 * 3 * 5 * 7 * 2
    assert measure.TRANSFERS == {"forward": 3, "backward": 5, "both": 8}


def gathered_step(rank, world_size):
    """Communication of the layer that stands for torch.nn.SyncBatchNorm."""
    from gather_syncbn import GatherSyncBN

    from tests.ranks import counted_communication

    input = torch.randn(3, 5, 4, requires_grad=True)
    with counted_communication() as seen:
        GatherSyncBN(5)(input).sum().backward()
    return [name for name, *_ in seen], [math.prod(shape) for _, shape, _ in seen]


def test_the_stand_in_sends_what_torch_sends(reference_ranks):
    """A gather of 2C + 1 numbers in forward, an all_reduce of 2C in backward."""
    for names, sizes in reference_ranks.run(gathered_step, 2):
        assert names == ["all_gather", "all_reduce"]
        assert sizes == [11, 10]


def test_one_rank_communicates_only_while_compared(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    from tests.ranks import counted_communication

    try:
        layer, input = triton_syncbn.SyncBN(3), torch.randn(4, 3)
        with counted_communication() as seen:
            with implementations.synchronized_even_alone():
                layer(input)
            layer(input)
        assert [name for name, *_ in seen] == ["all_reduce"]
    finally:
        dist.destroy_process_group()
