"""What the compiler makes of the kernels for sm90, with no GPU. A process of its own, as Triton
cannot interpret and compile in one.
"""

import os
import pathlib
import subprocess
import sys

import pandas as pd
import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_all_loads_of_a_tile_are_under_way_at_a_time_and_registers_suffice(tmp_path):
    """The compiler is free to wait for a load before it issues the next; then a reduction has a
    quarter of the bytes in flight that its config asks for.
    """
    table = tmp_path / "table.csv"
    done = subprocess.run(
        [
            *(sys.executable, "perf/inspect_kernels.py", "--execute", "--csv", str(table)),
            *("--layer", "resnet50 stem", "--dtype", "bf16", "--layout", "channels_first"),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = pd.read_csv(table).set_index("kernel")
    assert kernels.in_flight.to_dict() == {
        "moments": 4,
        "grad_moments": 4,
        "normalize": 4,
        "grad_input": 8,
    }
    assert (kernels["spilled"] == 0).all()
    assert (kernels.registers <= 128).all()
    assert kernels.accesses.str.contains("LDG128").all()
    assert (kernels.sectors_of_bytes <= 1.05).all()
