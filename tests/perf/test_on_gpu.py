"""perf/on_gpu.py: it says what is missing, its steps run to the device, it judges the figures."""

import os
import shlex
import shutil
import subprocess
import sys

import on_gpu
import pandas as pd
import pytest
import torch
from layers.implementations import implementations
from machine.environment import ROOT
from report.goals import (
    BOUND,
    FIGURES,
    LAYER,
    OURS,
    STOCK,
    goals,
    goals_text,
    layers_measured,
)
from report.tables import COLUMNS

# Runs commands as if there were a GPU: each has to end where torch first asks for it.
WITHOUT_DRIVER = """
import io, contextlib, runpy, sys, torch
torch.cuda.is_available = lambda: True
for command in sys.stdin.read().splitlines():
    sys.argv = command.split()
    sys.path[0] = "perf"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except (AssertionError, AttributeError, RuntimeError, SystemExit) as error:
        print(f"{command} => {error}")
"""


def test_every_step_runs_until_it_needs_the_device(tmp_path):
    commands = [
        step.arguments.format(out=tmp_path)
        for step in (*on_gpu.STEPS, *(step.made_quick() for step in on_gpu.STEPS))
        if not step.arguments.startswith("-m")
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER],
        input="\n".join(commands),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ends = dict(line.split(" => ") for line in done.stdout.splitlines())
    assert list(ends) == commands, done.stderr
    for end in ends.values():
        assert "CUDA" in end or "_cuda_" in end or "NVIDIA driver" in end


def test_a_quick_run_takes_a_quarter_of_an_hour_at_most(capsys):
    assert on_gpu.main(["--quick", "--list"]) == 0
    minutes = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(minutes) == len(on_gpu.STEPS) - 1  # blocks of ReLU alone are left out
    assert sum(minutes) <= 15


def test_it_says_in_one_line_what_is_missing(monkeypatch, tmp_path, capsys):
    def said() -> str:
        with pytest.raises(SystemExit) as stopped:
            on_gpu.main([str(tmp_path)])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for CPUs: expected a build for CUDA" in said()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU, or no driver" in said()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert "the GPU is sm70: expected sm75 or newer" in said()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "torch is built without NCCL" in said()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert on_gpu.missing() is None
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_or_lasts_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    steps = [
        on_gpu.Step("fails", 1, shlex.join(["-c", "print('so'); raise SystemExit(3)"])),
        on_gpu.Step("lasts", 0, shlex.join(["-c", "input()"])),
        on_gpu.Step("works", 1, shlex.join(["-c", "open(r'{out}/file', 'w').write('it')"])),
    ]
    monkeypatch.setattr(on_gpu, "STEPS", steps)
    monkeypatch.setattr(on_gpu, "missing", lambda: None)
    assert on_gpu.main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "FAIL (3): fails" in output
    assert "FAIL (stopped after 0 minutes): lasts" in output
    assert "ok: works" in output
    assert (tmp_path / "fails.txt").read_text() == "so\n"
    assert (tmp_path / "file").read_text() == "it"
    assert "not measured" in (tmp_path / "goals.md").read_text()


def rows_of(**microseconds: list[float]) -> pd.DataFrame:
    """Three layers of 4, 16 and 128 MB, in bf16."""
    shapes = ["32x64x32x32", "32x64x64x64", "32x512x64x64"]
    return pd.DataFrame(
        [
            {
                **{"impl": impl, "pass": name, "layer": f"of {shape}", "shape": shape},
                **{"dtype": "bf16", "layout": "channels_first", "block": "none", "us_p50": time},
                **{"host_us": time / 2, "copy_fraction": 10 / time, "host_syncs": 0},
            }
            for impl, times in microseconds.items()
            for shape, time in zip(shapes, times, strict=True)
            for name in ("forward", "both")
        ]
    )


def test_goals_read_what_is_written():
    assert {*LAYER, *FIGURES, "impl", "pass"} <= set(COLUMNS)
    assert {STOCK, OURS, BOUND} <= set(implementations(torch.device("cuda")))


def test_goals_are_held_against_what_was_measured(tmp_path):
    rows_of(
        torch_syncbn=[20, 64, 100], triton_syncbn=[10, 8, 20], torch_batchnorm=[9, 9, 25]
    ).to_csv(tmp_path / "rows.csv")
    shutil.copy(tmp_path / "rows.csv", tmp_path / "graphs.csv")
    found = {goal.figure: goal for goal in goals(tmp_path)}
    assert found["stock / ours, geometric mean"].measured == pytest.approx((2 * 8 * 5) ** (1 / 3))
    assert found["stock / ours, geometric mean"].verdict == "reached"
    worst = found["stock / ours, worst row"]
    assert worst.measured == 2.0
    assert worst.worst == "of 32x64x32x32 32x64x32x32 bf16 channels_first none"
    assert found["copy bandwidth, rows of 64 MB and more"].measured == 0.5
    assert found["copy bandwidth, rows of 64 MB and more"].verdict == "missed"
    assert found["copy bandwidth, rows of 8 to 48 MB"].measured == 1.25
    assert found["host time, ours / stock"].measured == pytest.approx((2 * 8 * 5) ** (-1 / 3))
    assert found["host time, ours / stock"].verdict == "reached"
    assert found["waits of the host, ours"].verdict == "reached"
    assert found["ours / batch norm without synchronization"].measured == pytest.approx(10 / 9)
    assert found["block relu: stock eager / ours"].verdict == "not measured"
    assert "| stock / ours, worst row | ≥ 1.15 | 2 | reached | of 32x64x32x32" in goals_text(
        list(found.values())
    )


def test_what_was_stopped_is_seen(tmp_path):
    whole = rows_of(torch_syncbn=[20] * 3, triton_syncbn=[10] * 3)
    whole.to_csv(tmp_path / "graphs.csv")
    whole[whole["shape"] == "32x64x32x32"].to_csv(tmp_path / "tuned.csv")
    assert all(goal.file != "tuned" for goal in goals(tmp_path))
    (tmp_path / "candidates.csv").write_text("bucket,us\nmoments,1\n")
    said = layers_measured(tmp_path)
    assert "3 in graphs.csv, 1 in tuned.csv" in said
    assert "candidates" not in said


def test_layers_as_tuned_count(tmp_path):
    for name, time in (("graphs", 10), ("tuned", 5)):
        rows_of(torch_syncbn=[20] * 3, triton_syncbn=[time] * 3, torch_batchnorm=[9] * 3).to_csv(
            tmp_path / f"{name}.csv"
        )
    of_graphs = [goal for goal in goals(tmp_path) if goal.figure.startswith("CUDA graphs")]
    assert [(goal.measured, goal.file) for goal in of_graphs] == [(pytest.approx(4), "tuned")]
