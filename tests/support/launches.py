"""Launches as the driver gets them, on a machine without one: compiled kernels are replaced by
their names, and a launch beside the same one by Triton. For a process of its own.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from layers.steps import KERNELS, Operands, run_step
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_syncbn.kernels import launch, launch_config, launchers  # noqa: F401

from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.ops import new_gates

CUDA, HIP = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
SHAPE = (4, 8, 5, 6)


class GPU:
    """A driver that there is not."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device, self.stream = target, 0, 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream


class Pair(NamedTuple):
    """A launch, and the same one by Triton."""

    past_triton: bool
    compiled: tuple[str, ...]  # what Triton would have compiled for it
    same: bool  # the kernel, the grid, the stream and the arguments


@contextlib.contextmanager
def launched_twice(gpu: GPU) -> Iterator[list[Pair]]:
    """Collect the launches of the steps, each made a second time by Triton."""
    pairs: list[Pair] = []
    calls: list[tuple[Any, ...]] = []
    runs: list[None] = []

    def called(compiled: Any, *arguments: Any) -> None:
        grid_stream_and_function, of_kernel = arguments[:6], arguments[9:]  # between: for hooks
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in of_kernel]
        calls.append((compiled, *grid_stream_and_function, *values))

    def compiled_for(self: Any, key: str, *arguments: Any) -> CompiledKernel:
        name = (str(gpu.device), key)
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.name, kernel.src, kernel.hash = self.__name__, None, name
        kernel.metadata = types.SimpleNamespace(target=gpu.target)
        kernel.module = kernel.function = kernel.packed_metadata = hash(name)
        kernel._run = functools.partial(called, name)
        self.device_caches[gpu.device][0][key] = kernel
        return kernel

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        runs.append(None)
        return original(self, *arguments, **options)

    def twice(
        kernel: Any, programs: int, plan: Any, tensors: Any, numbers: Any = (), **constants: Any
    ) -> None:
        before = len(runs)
        launch.launch(kernel, programs, plan, tensors, numbers, **constants)
        past_triton = len(runs) == before
        launch._launch_by_triton(kernel, programs, plan, tensors, numbers, constants)
        pairs.append(Pair(past_triton, calls[-1][0], calls[-2] == calls[-1]))

    original = JITFunction.run
    driver.set_active(gpu)
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            module = sys.modules[f"triton_syncbn.kernels.{name}"]
            getattr(module, f"{name}_kernel").device_caches.clear()
            stack.enter_context(mock.patch.object(module, "launch", twice))
        for where, name, value in (
            (JITFunction, "_do_compile", compiled_for),
            (JITFunction, "run", run),
            (launch_config, "multiprocessors", lambda device: 132),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        launch._plan.cache_clear()
        yield pairs


def operands(
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    activation: str | None = None,
    residual: bool = False,
) -> Operands:
    """Of a layer with all that it can have."""

    def vector(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    input = torch.empty(shape, dtype=dtype, device=device)
    channels = shape[1]
    gated = activation is not None and ACTIVATIONS[activation].gated
    return Operands(
        input,
        torch.empty_like(input),
        vector(2 * channels + 1, torch.float64),
        vector(2 * channels, torch.float64),
        *(vector(channels) for _ in range(4)),
        torch.tensor(0, device=device),
        activation=activation,
        residual=torch.empty_like(input) if residual else None,
        gates=new_gates(input, True) if gated and residual else None,
        grad_residual=torch.empty_like(input) if residual else None,
    )


def _beside(tensor: torch.Tensor) -> torch.Tensor:
    """The same at an address that is no multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def variations() -> dict[str, Operands]:
    """Launches that differ from the first in one of what Triton looks at."""
    base = operands()
    last = torch.channels_last
    large = (2**20, 8, 64, 64)  # has 2**32 rows of channels
    found = {"base": base, "other memory": operands()}
    for field in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        tensor = getattr(base, field)
        found[f"{field} beside"] = base._replace(**{field: _beside(tensor.reshape(-1))})
        for dtype in (torch.bfloat16, torch.float64):
            found[f"{field} {dtype}"] = base._replace(**{field: tensor.to(dtype)})
    for field in ("input", "grad_output", "moments", "grad_moments"):
        found[f"{field} beside"] = base._replace(**{field: _beside(getattr(base, field))})
    return {
        **found,
        "no weight": base._replace(weight=None),
        "no bias": base._replace(bias=None),
        "no buffers": base._replace(running_mean=None, running_var=None),
        "no counter": base._replace(num_batches_tracked=None),
        "average": base._replace(momentum=None),
        "momentum 1": base._replace(momentum=1),
        "eps 0": base._replace(eps=0),
        "grad_output float64": base._replace(grad_output=base.grad_output.double()),
        "bfloat16": operands(dtype=torch.bfloat16),
        "channels last": base._replace(
            input=base.input.to(memory_format=last), grad_output=base.input.to(memory_format=last)
        ),
        "no values": operands((0, 8, 5, 6)),
        "relu": operands(activation="relu"),
        "relu, residual": operands(activation="relu", residual=True),
        "silu, residual": operands(activation="silu", residual=True),
        "residual": operands(residual=True),
        "small": operands(device="meta"),
        "large": operands(large, device="meta"),
        "large, channels last": operands(large, device="meta")._replace(
            input=torch.empty(large, device="meta", memory_format=last),
            grad_output=torch.empty(large, device="meta", memory_format=last),
        ),
    }


def pairs_of_variations(target: GPUTarget) -> dict[tuple[str, str], list[Pair]]:
    """The launches of each kernel, two for each variation, all of them one after the other, twice;
    then on another stream and on another device.
    """
    gpu = GPU(target)
    found: dict[tuple[str, str], list[Pair]] = {}
    with launched_twice(gpu) as pairs:
        for name in KERNELS:
            for _ in range(2):
                for variation, of in variations().items():
                    del pairs[:]
                    run_step(name, of)
                    run_step(name, of)
                    found.setdefault((name, variation), []).extend(pairs)
            for gpu.device, gpu.stream, where in (
                (0, 7, "stream"),
                (1, 0, "device"),
                (0, 0, "back"),
            ):
                del pairs[:]
                run_step(name, operands())
                found[name, where] = list(pairs)
    return found


def launches_past_triton(observed: str) -> list[bool]:
    """Whether launches go past Triton: before something is observed, while, and after it."""
    answers = []
    of = operands()
    kernel = sys.modules["triton_syncbn.kernels.moments"].moments_kernel

    @contextlib.contextmanager
    def hooked(hooks: Any) -> Iterator[None]:
        hooks.add(note)
        yield
        hooks.remove(note)

    def note(*arguments: Any, **options: Any) -> None: ...

    @contextlib.contextmanager
    def turned(part: Any, name: str, value: Any) -> Iterator[None]:
        with part.scope():
            setattr(part, name, value)
            yield

    ways = {
        "enter hook": lambda: hooked(knobs.runtime.launch_enter_hook),
        "exit hook": lambda: hooked(knobs.runtime.launch_exit_hook),
        "assigned hook": lambda: turned(knobs.runtime, "launch_enter_hook", note),
        "debug": lambda: turned(knobs.runtime, "debug", True),
        "instrumentation": lambda: turned(knobs.compilation, "instrumentation_mode", "other"),
        "pre-run hook": lambda: mock.patch.object(kernel, "pre_run_hooks", [note]),
        "unknown Triton": lambda: mock.patch.object(launch, "_CHANGES", ("unknown",)),
    }
    with launched_twice(GPU(CUDA)) as pairs:
        run_step("moments", of)
        for way in (contextlib.nullcontext, ways[observed], contextlib.nullcontext):
            with way():
                run_step("moments", of)
                assert pairs[-1].same
                answers.append(pairs[-1].past_triton)
    return answers
