"""Host time of a layer, with no GPU: what Python and Triton take before the driver is called.

Everything runs as on a GPU but for what would reach it: on small CPU tensors, with the call of the
driver replaced, and the all_reduce. In turns with it: torch's own batch norm, which computes as
well, and an autograd function of the same tensors that does nothing. Times of this kind say nothing
of a GPU's, and are of one machine; the ratio to torch's batch norm is what to compare.
"""

import argparse
import contextlib
import cProfile
import pathlib
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import triton
from compiler.compiling import NoGPU
from layers.cases import LAYOUTS, laid_out
from layers.steps import KERNELS
from machine.environment import commit
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_syncbn.kernels import launch_config, launchers

import triton_syncbn
from triton_syncbn import ops

SHAPE = (2, 64, 8, 8)
MULTIPROCESSORS = 132  # of the GPU that there is not: so many programs share a channel
THEIRS, EMPTY, OURS, LIBRARY = (
    "torch.nn.BatchNorm2d",
    "an empty autograd function",
    "triton_syncbn",
    "triton_syncbn, launches replaced",
)
WORKS = ("training step", "training forward without gradients", "eval forward")
KEYS = ["layout", "work", "layer"]
WARM_UP = 5  # calls of a turn that are not counted
WORSE = 1.2  # a ratio that is so much larger than the baseline's is a regression


class Turn(NamedTuple):
    """One of those that take turns."""

    layout: str
    work: str
    layer: str
    call: Callable[[], Any]


class HostOnlyGPU(NoGPU):
    """A driver that launches nothing, and answers as fast as one."""

    def __init__(self) -> None:
        super().__init__(GPUTarget("cuda", 90, 32))

    def get_current_device(self) -> Any:
        """The number of a device."""
        return 0


class EmptyFunction(torch.autograd.Function):
    """Takes what a layer's function takes, and returns what it is given."""

    @staticmethod
    def forward(ctx: Any, results: tuple[Any, ...], *operands: Any) -> Tensor:
        """The first result."""
        ctx.results = results
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The others: gradients of input, weight and bias."""
        return None, *ctx.results[1:], *[None] * 5


@contextlib.contextmanager
def no_gpu() -> Iterator[list[int]]:
    """Compile kernels, and launch none: count launches in the list. In a group of two ranks, of
    which there is one.
    """
    count = [0]

    def launch_nothing(*arguments: Any) -> None:
        count[0] += 1

    compile_kernel = JITFunction._do_compile

    def compile_for_no_driver(self: Any, *arguments: Any) -> Any:
        kernel = compile_kernel(self, *arguments)
        kernel._run = launch_nothing
        kernel.module = kernel.function = 0
        return kernel

    driver.set_active(HostOnlyGPU())
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    with (
        mock.patch.object(ops, "_backend", lambda device_type: launchers),
        mock.patch.object(launch_config, "multiprocessors", lambda device: MULTIPROCESSORS),
        mock.patch.object(dist, "all_reduce", lambda *arguments, **options: None),
        mock.patch.object(JITFunction, "_do_compile", compile_for_no_driver),
    ):
        yield count
    dist.destroy_process_group()


@contextlib.contextmanager
def launches_replaced() -> Iterator[None]:
    """Do nothing for a launch, which leaves the library and torch's autograd."""
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            module = sys.modules[f"triton_syncbn.kernels.{name}"]
            stack.enter_context(mock.patch.object(module, "launch", lambda *a, **k: None))
        yield


def turns_of(layout: str) -> list[Turn]:
    """What is measured in a layout."""
    input, grad_output = (laid_out(torch.randn(SHAPE), layout) for _ in range(2))
    input.requires_grad_()
    output = laid_out(torch.randn(SHAPE), layout)
    turns = []
    for name, make in ((THEIRS, torch.nn.BatchNorm2d), (OURS, triton_syncbn.SyncBN)):
        layer, frozen = make(SHAPE[1]), make(SHAPE[1]).eval()
        leaves = [input, *layer.parameters()]

        def step(layer: Any = layer, leaves: Any = leaves) -> None:
            torch.autograd.grad(layer(input), leaves, grad_output)

        def forward(layer: Any = layer) -> None:
            with torch.no_grad():
                layer(input)

        def in_eval(layer: Any = frozen) -> None:
            with torch.no_grad():
                layer(input)

        turns += [
            Turn(layout, work, name, call)
            for work, call in zip(WORKS, (step, forward, in_eval), strict=True)
        ]
        if name == OURS:
            turns.append(Turn(layout, WORKS[0], LIBRARY, step))
            operands = (*leaves, *layer.buffers(), 0.1, 1e-5)
            results = output, grad_output, layer.weight.detach(), layer.bias.detach()

            def empty(operands: Any = operands, results: Any = results) -> None:
                y = EmptyFunction.apply(results, *operands)
                torch.autograd.grad(y, operands[:3], grad_output)

            turns.append(Turn(layout, WORKS[0], EMPTY, empty))
    return turns


def measure(turns: list[Turn], repeats: int, rounds: int) -> pd.DataFrame:
    """Microseconds of each, the lower quartile of all calls, which other processes do not reach;
    and the ratio to torch's batch norm at the same work in the same layout.
    """
    times: list[list[int]] = [[] for _ in turns]
    for _ in range(rounds):
        for turn, found in zip(turns, times, strict=True):
            with launches_replaced() if turn.layer == LIBRARY else contextlib.nullcontext():
                for _ in range(WARM_UP):
                    turn.call()
                for _ in range(repeats):
                    start = time.perf_counter_ns()
                    turn.call()
                    found.append(time.perf_counter_ns() - start)
    rows = pd.DataFrame([turn[:3] for turn in turns], columns=KEYS)
    rows["us"] = np.percentile(times, 25, axis=1) / 1e3
    theirs = rows.us.where(rows.layer == THEIRS).groupby([rows.layout, rows.work])
    rows["ratio"] = rows.us / theirs.transform("max")
    return rows


def regressions(rows: pd.DataFrame, baseline: pd.DataFrame) -> list[str]:
    """A line for each of our ratios that is worse than in an earlier run.

    Raises ValueError if the earlier run has no such rows.
    """
    ours = rows[rows.layer.isin((OURS, LIBRARY))]
    both = ours.merge(baseline, on=KEYS, suffixes=("", "_before"))
    if both.empty:
        raise ValueError("--baseline: expected rows of the same layouts, got none")
    slower = both[both.ratio > both.ratio_before * WORSE]
    return [
        f"SLOWER: {row.layout}, {row.work}, {row.layer}: "
        f"{row.ratio:.2f} of torch's, was {row.ratio_before:.2f}"
        for row in slower.itertuples()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table. 1 if a ratio is worse than the baseline's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--csv", type=pathlib.Path, help="write the rows there")
    parser.add_argument("--baseline", type=pathlib.Path, help="fail where a ratio is 20 %% worse")
    parser.add_argument("--profile", action="store_true", help="print where a training step is")
    options = parser.parse_args(arguments)
    baseline = None if options.baseline is None else pd.read_csv(options.baseline)
    torch.set_num_threads(1)
    print(f"triton_syncbn of {triton_syncbn.__path__[0]}, commit {commit()}, ", end="")
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    with no_gpu() as count:
        turns = [turn for layout in options.layout for turn in turns_of(layout)]
        for turn in turns:
            turn.call()  # compiles
        count[0] = 0
        for turn in turns:
            turn.call()
        steps = sum(turn.layer in (OURS, LIBRARY) and turn.work == WORKS[0] for turn in turns)
        forwards = sum(turn.layer == OURS and turn.work == WORKS[1] for turn in turns)
        assert count[0] == 4 * steps + 2 * forwards, "a layer did not launch its kernels"
        rows = measure(turns, options.repeats, options.rounds)
        if options.profile:
            with cProfile.Profile() as profile:
                for turn in turns:
                    for _ in range(1000 * (turn.layer == OURS and turn.work == WORKS[0])):
                        turn.call()
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(rows.to_string(index=False, float_format="{:.2f}".format))
    if options.csv is not None:
        rows.to_csv(options.csv, index=False)
    slower = [] if baseline is None else regressions(rows, baseline)
    print("\n".join(slower))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
