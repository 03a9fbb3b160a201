"""How exact a training step is, on hard data: writes tests/ACCURACY.md, or with --examples draws so
many batches and stops at one that is not exact.

Kernels run in Triton's interpreter, on any machine.
"""

import argparse
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from machine.environment import ROOT
from numerics.errors import faults
from numerics.examples import drawn_example
from numerics.interpreter import prepare
from numerics.table import OURS, accuracy_table
from numerics.training import train_steps


def sweep(count: int) -> None:
    """Draw examples and check all implementations."""
    for seed in range(count):
        example = drawn_example(seed)
        for implementation in OURS:
            found = faults(example, train_steps(implementation, example))
            assert not found, f"seed {seed}, {implementation}: {found}"
    print(f"{count} examples: all exact")


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or check what is drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, help="check so many, write nothing")
    parser.add_argument("--seeds", type=int, default=5, help="batches of each row of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepare()
    if options.examples:
        sweep(options.examples)
    else:
        (ROOT / "tests" / "ACCURACY.md").write_text(accuracy_table(options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
