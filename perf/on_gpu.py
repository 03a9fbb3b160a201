"""All that a GPU is needed for, one step after the other, into a folder: tests, times, configs.

Each step ends by a limit of time, and none waits for another to succeed. `--quick` leaves out what
is not needed to see whether a goal is reached, for a machine that is lent for a quarter of an hour.
`--list` shows the steps with no GPU.
The exit status is 2 if something is missing, 1 if a step failed.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from machine.environment import ROOT
from report.goals import goals, goals_text, layers_measured
from triton_syncbn.kernels import tuned_configs

LEAST_CAPABILITY = (7, 5)  # Triton's
COMPARE = "perf/compare.py --dtype bf16 fp32 --layout channels_first channels_last"
MODELS = (
    "perf/compare.py --model resnet50 deeplab --dtype bf16 --layout channels_first --samples 30"
)


QUICK = "--impl torch_batchnorm torch_syncbn triton_syncbn --pass both --samples 10"


class Step(NamedTuple):
    """A command of Python, run in the checkout; its output goes to OUT/name.txt."""

    name: str
    minutes: float  # after which it is stopped
    arguments: str  # {out} stands for the folder
    quick: str = QUICK  # arguments that are added, and override others, in a quick run
    quick_minutes: float = 1.0  # 0: left out

    def command(self, out: pathlib.Path) -> list[str]:
        """As a process gets it."""
        return [sys.executable, *(word.format(out=out) for word in shlex.split(self.arguments))]

    def made_quick(self) -> "Step":
        """The step of a quick run."""
        return Step(self.name, self.quick_minutes, f"{self.arguments} {self.quick}".strip())


STEPS = (
    Step("versions", 1, "-m torch.utils.collect_env", "", 0.5),
    # The first of a kind compiles, unless that was done ahead: then it takes half a minute, and
    # those without graphs a minute each.
    Step("graphs", 20, f"{COMPARE} --cuda-graph --csv {{out}}/graphs.csv", QUICK, 1.5),
    Step("rows", 20, f"{COMPARE} --csv {{out}}/rows.csv", QUICK, 1.5),
    Step("add_relu", 20, f"{COMPARE} --block add_relu --csv {{out}}/add_relu.csv", QUICK, 1.5),
    Step(
        "add_relu_graphs",
        20,
        f"{COMPARE} --block add_relu --cuda-graph --csv {{out}}/add_relu_graphs.csv",
        QUICK,
        1.5,
    ),
    Step("relu", 20, f"{COMPARE} --block relu --csv {{out}}/relu.csv", QUICK, 0),
    Step(
        "tests",
        15,
        "-m pytest -m gpu -q --numprocesses 8 --dist loadgroup",
        quick="tests/gpu tests/kernels/test_kernels.py tests/kernels/test_blocks.py",
        quick_minutes=3,
    ),
    Step("models", 15, f"{MODELS} --csv {{out}}/models.csv", QUICK, 1.5),
    Step(
        "tune",
        35,
        "perf/tune.py --out {out} --csv {out}/candidates.csv --budget 30",
        quick="--budget 2.5",
        quick_minutes=3,
    ),
    Step("tuned", 20, f"{COMPARE} --cuda-graph --csv {{out}}/tuned.csv"),
)


def missing() -> str | None:
    """What this machine lacks, in a line; None where nothing does."""
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built for CPUs: expected a build for CUDA or ROCm"
    if not torch.cuda.is_available():
        return "no GPU, or no driver that this torch can use (nvidia-smi shows both)"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < LEAST_CAPABILITY:
        return f"the GPU is sm{capability[0]}{capability[1]}: expected sm75 or newer"
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "Triton is not installed"
    return None if dist.is_nccl_available() else "torch is built without NCCL"


def run(steps: list[Step], out: pathlib.Path) -> list[str]:
    """Run the steps; a line of each, as printed. Those that failed begin with FAIL. Configs that a
    step leaves in the folder are those of the steps after it.
    """
    lines = []
    env = os.environ | {tuned_configs.VARIABLE: str(out)}
    for step in steps:
        start = time.monotonic()
        with (out / f"{step.name}.txt").open("w", encoding="utf-8") as output:
            print(f"{step.name} ...", flush=True)
            process = subprocess.Popen(
                step.command(out),
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: object = process.wait(step.minutes * 60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and those that it has started
                process.wait()
                status = f"stopped after {step.minutes:g} minutes"
        seconds = time.monotonic() - start
        verdict = "ok" if status == 0 else f"FAIL ({status})"
        lines.append(f"{verdict}: {step.name}, {seconds:.0f} s, {output.name}")
        print(lines[-1], flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the steps asked for, then hold what was measured against the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path, nargs="?", help="folder for what is written")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    parser.add_argument("--quick", action="store_true", help="a quarter of an hour at most")
    parser.add_argument("--list", action="store_true", help="show the steps and their limits")
    options = parser.parse_args(arguments)
    steps = [step for step in STEPS if step.name in options.only]
    if options.quick:
        steps = [step.made_quick() for step in steps if step.quick_minutes]
    if options.list:
        for step in steps:
            print(f"{step.name:15} {step.minutes:4g} min at most: python {step.arguments}")
        return 0
    if options.out is None:
        parser.exit(2, "make gpu: expected a folder to write to: make gpu OUT=folder\n")
    if lack := missing():
        parser.exit(2, f"make gpu: {lack}\n")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = run(steps, out)
    table = goals_text(goals(out)) + layers_measured(out)
    (out / "goals.md").write_text(table, encoding="utf-8")
    print(table)
    return int(any(line.startswith("FAIL") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
