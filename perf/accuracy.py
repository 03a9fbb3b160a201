"""How exact a training step is, on hard data: writes tests/ACCURACY.md.

Kernels run in Triton's interpreter, on any machine.
"""

import argparse
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
import triton
from machine.environment import ROOT, commit, has_changes
from numerics.errors import error, exact_result, scales
from numerics.examples import HARD_EXAMPLES, hard_example
from numerics.interpreter import prepare
from numerics.training import COMPARED, train_steps, train_torch

OURS = ("kernels", "cpu", "reference")
SHORT = {"output": "y", "grad_input": "dx"}
TITLE = """# How exact it is

Made by `python perf/accuracy.py`; {versions}.

The worst of {seeds} batches: norm of the error over the norm of the float64 result; for dx over
that of its largest term, weight * rstd * dy; for running_mean over that of max(|mean|, std) of the
channels. *Kernels* (in Triton's interpreter), *CPU* (what runs there) and *plain torch* (on other
devices) are ours, with the samples on three ranks, one of them empty; *torch* is
torch.nn.BatchNorm2d on this CPU, with all samples in one process. All are float32, those of the
last row bfloat16. *Ratio* is torch's error over that of the kernels. Errors under 2e-7 are the last
roundings of float32; a ratio of two such is chance.

Running statistics start at 0 here, so that their digits are those of the batch. At mean / std = 1e6
float32 holds x itself to 3% of a deviation, and the float64 sum of squares that ranks send holds
the variance to some 1e-4: y, dx and running_var keep all their digits up to mean / sqrt(var + eps)
= 1e4.

| case | | kernels | CPU | plain torch | torch | ratio |
|---|---|---|---|---|---|---|
"""


def measure(name: str, seeds: int) -> dict[str, list[float]]:
    """The worst errors of each of ours and of torch in a hard example."""
    worst = {compared: [0.0] * (len(OURS) + 1) for compared in COMPARED}
    for seed in range(seeds):
        example = hard_example(name, seed)
        exact = exact_result(example)
        scale = scales(example, exact)
        results = [*(train_steps(steps, example) for steps in OURS), train_torch(example)]
        for compared in COMPARED:
            errors = [error(compared, result, exact, scale) for result in results]
            worst[compared] = list(map(max, worst[compared], errors))
    return worst


def accuracy_table(seeds: int) -> str:
    """The text of ACCURACY.md."""
    changes = "-dirty" if has_changes() else ""
    versions = f"torch {torch.__version__}, triton {triton.__version__}, commit {commit()}{changes}"
    lines = []
    for name in HARD_EXAMPLES:
        title = name
        for compared, (kernels, cpu, plain, theirs) in measure(name, seeds).items():
            ratio = f"{theirs / kernels:.2g}" if kernels else "-"
            lines.append(
                f"| {title} | {SHORT.get(compared, compared)} | {kernels:.1e} | {cpu:.1e} | "
                f"{plain:.1e} | {theirs:.1e} | {ratio} |\n"
            )
            title = ""
    return TITLE.format(versions=versions, seeds=seeds) + "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="batches of each row of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepare()
    (ROOT / "tests" / "ACCURACY.md").write_text(accuracy_table(options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
