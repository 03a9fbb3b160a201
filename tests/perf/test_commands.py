"""Every command of perf/ says what it does."""

import os
import subprocess
import sys

import pytest
from machine.environment import ROOT

COMMANDS = sorted(path.name for path in (ROOT / "perf").glob("*.py"))
HELP = """
import contextlib, io, runpy, sys
sys.path.insert(0, "perf")
for command in sys.argv[1:]:
    sys.argv = [f"perf/{command}", "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(command, end.code, "usage: " + command in printed.getvalue())
"""


def test_every_command_has_help():
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"{command} 0 True" for command in COMMANDS], done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed(command):
    assert f"| `{command}` |" in (ROOT / "perf" / "README.md").read_text(encoding="utf-8")
