"""perf/compile_ahead.py: what it leaves is all that a launch needs, and is found elsewhere."""

import json
import os
import subprocess
import sys

import compile_ahead
import pytest
from layers.cases import LAYOUTS, read_cases, suites
from machine.environment import ROOT

pytest.importorskip("triton")

ARGUMENTS = ("--suite", "heads", "--dtype", "fp32")


def test_each_different_kernel_is_compiled_once():
    cases = read_cases(suites(), ["bf16", "fp32"], list(LAYOUTS))
    few, many = (compile_ahead.launches(cases, 132, tune) for tune in (False, True))
    assert {launch.kernel for launch in few} == {*compile_ahead.KERNELS}
    assert {launch.flags for launch in few} == {*compile_ahead.BLOCKS}
    assert len(few) < 4 * len(cases) < len(many)
    assert many[: len(few)] == few


@pytest.mark.slow
def test_a_compiled_kernel_is_found_elsewhere(tmp_path):
    """Moved to where it was said to lie, Triton compiles none of it again."""
    out, there = tmp_path / "out", tmp_path / "there"

    def run(out, at, **env):
        done = subprocess.run(
            [sys.executable, "perf/compile_ahead.py", *ARGUMENTS, "--out", out, "--at", at],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "kernels for sm90" in run(out, there)
    out.rename(there)
    (group,) = next(there.iterdir()).glob("__grp__*")
    paths = json.loads(group.read_text())["child_paths"]
    assert {os.path.splitext(path)[1] for path in paths.values()} == {".cubin", ".json"}
    assert all(os.path.exists(path) for path in paths.values())
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    code = (
        "import sys; sys.path.insert(0, 'perf'); import compile_ahead as ahead\n"
        "from layers.cases import LAYOUTS, read_cases\n"
        "cases = read_cases(['heads'], ['fp32'], list(LAYOUTS))\n"
        "for launch in ahead.launches(cases, 132, False): ahead.compile_launch(launch, 'sm90')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(there), "TRITON_INTERPRET": "0"},
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
