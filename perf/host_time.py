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
from cases import LAYOUTS
from implementations import synchronized_even_alone
from no_gpu import NoGPU
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import triton_syncbn
from triton_syncbn import ops

STEPS = ("moments", "normalize", "grad_moments", "grad_input")
SHAPE = (2, 64, 8, 8)


def launcher(name: str, device_type: str) -> Callable[..., Any]:
    """The launcher of a step, whatever the device."""
    module = __import__(f"triton_syncbn.kernels.{name}", fromlist=[name])
    return getattr(module, name)


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
        mock.patch.object(ops, "_step", launcher),
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
    format = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    input = torch.randn(SHAPE).to(memory_format=format).requires_grad_()
    leaves = [input, *layer.parameters()]
    grad_output = torch.randn(SHAPE).to(memory_format=format)

    def step() -> None:
        torch.autograd.grad(layer(input), leaves, grad_output)

    print("Forward + backward, ", end="")
    print(f"triton_syncbn of {triton_syncbn.__path__[0]}, torch {torch.__version__}, ", end="")
    print(f"triton {triton.__version__}")
    with tempfile.TemporaryDirectory() as folder, synchronized_even_alone():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
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
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
