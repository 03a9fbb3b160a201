"""Host time of a layer, with no GPU: what the library's Python takes for forward and backward.

Everything runs as on a GPU but for what would reach it: on CPU tensors, with the kernels' launches
replaced, and with the all_reduce. Twice: with Triton's launch replaced as a whole, which leaves the
library and torch's autograd; and with only the call of the driver replaced, which leaves Triton's
work for a launch, too. Times of this kind say nothing of a GPU's; compare them on one machine.
"""

import argparse
import contextlib
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import triton
from compiler.compiling import NoGPU
from layers.cases import LAYOUTS, laid_out
from layers.implementations import synchronized_even_alone
from layers.steps import step_of
from machine.ranks import Place, process_group
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import triton_syncbn
from triton_syncbn import ops

SHAPE = (2, 64, 8, 8)


@contextlib.contextmanager
def launches_replaced(whole: bool) -> Iterator[list[int]]:
    """Launch nothing; count launches in the list."""
    count = [0]

    def launch_nothing(*arguments: Any, **options: Any) -> None:
        count[0] += 1

    compile_kernel = JITFunction._do_compile

    def compile_for_no_driver(self: Any, *arguments: Any) -> Any:
        kernel = compile_kernel(self, *arguments)
        kernel._run = launch_nothing
        kernel.module = kernel.function = 0
        return kernel

    driver.set_active(NoGPU(GPUTarget("cuda", 90, 32)))
    patches: list[Any] = [
        mock.patch.object(ops, "_step", lambda name, device_type: step_of(name, "kernels")),
        mock.patch.object(dist, "all_reduce", lambda *arguments, **options: None),
        mock.patch.object(JITFunction, "run", launch_nothing)
        if whole
        else mock.patch.object(JITFunction, "_do_compile", compile_for_no_driver),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield count


def microseconds(work: Callable[[], Any], repeats: int, rounds: int) -> float:
    """Processor time of a repeat, of the round that other processes disturbed least."""
    means = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            work()
        means.append((time.thread_time() - start) / repeats * 1e6)
    return min(means)


def main(arguments: list[str] | None = None) -> int:
    """Print microseconds of forward + backward; with --profile, where they go."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layer = triton_syncbn.SyncBN(SHAPE[1])
    input, grad_output = (laid_out(torch.randn(SHAPE), options.layout) for _ in range(2))
    leaves = [input.requires_grad_(), *layer.parameters()]

    def step() -> None:
        torch.autograd.grad(layer(input), leaves, grad_output)

    print("Forward + backward, ", end="")
    print(f"triton_syncbn of {triton_syncbn.__path__[0]}, torch {torch.__version__}, ", end="")
    print(f"triton {triton.__version__}")
    place = Place(0, 1, torch.device("cpu"))
    with (
        tempfile.TemporaryDirectory() as folder,
        process_group(place, f"file://{folder}/store"),
        synchronized_even_alone(),
    ):
        for whole in (True, False):
            with launches_replaced(whole) as count:
                step()
                count[0] = 0
                step()
                launches = count[0]
                least = microseconds(step, options.repeats, options.rounds)
                left = "the library and autograd" if whole else "with Triton's work for launches"
                print(f"{options.layout}, {left}: {least:.1f} us, {launches} launches")
                if options.profile and whole:
                    with cProfile.Profile() as profile:
                        for _ in range(options.repeats):
                            step()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return 0


if __name__ == "__main__":
    sys.exit(main())
