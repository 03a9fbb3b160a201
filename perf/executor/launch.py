"""The kernels' launchers, unchanged, on CPU tensors: what they launch is compiled for an
architecture and executed here.
"""

import contextlib
import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from compiler.compiling import NoGPU
from numpy.typing import NDArray
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .machine import Machine
from .memory import GlobalMemory
from .parsing import Kernel, PtxError, parse
from .races import check_races

INTEGER_BITS = {f"{sign}{bits}": bits for sign in "iu" for bits in (1, 8, 16, 32, 64)}
FLOAT_FORMATS = {"fp32": "<f", "fp64": "<d"}
_OF_ARCHITECTURE = re.compile(r"^\.(version|target) .*$", re.MULTILINE)
# What launches have left in their tensors, by all that an execution depends on.
Results = dict[bytes, list[NDArray[np.uint8]]]


class Launch(NamedTuple):
    """A launch that was executed; or that was found among the results: then it has no machine."""

    compiled: str  # its hash
    kernel: Kernel
    machine: Machine | None


@contextlib.contextmanager
def executed_instead_of_launched(
    capability: int,
    seed: int | None = None,
    change: Callable[[Kernel], Kernel] | None = None,
    results: Results | None = None,
) -> Iterator[list[Launch]]:
    """Execute the launches under it, compiled for an architecture, such as 90, and collect them.

    seed: see `Machine`. change: what to do to a kernel before it is executed. results: what other
    launches have left; one that is theirs to the last byte, but for the name of its architecture,
    is not executed again. The driver stays replaced: such a process executes and does nothing else,
    and TRITON_INTERPRET must not be set in it.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def execute(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        compiled = run(self, *arguments, grid=grid, warmup=True, **named)
        text = _OF_ARCHITECTURE.sub("", compiled.asm["ptx"])
        kernel = parse(text)
        names = {name: value for name, value in named.items() if name in self.arg_names}
        values = self.signature.bind(*arguments, **names)
        values.apply_defaults()
        memory = GlobalMemory(seed or 0)
        parameters = [
            _bits(memory, name, kind, value)
            for name, kind, value in _flatten(compiled.src.signature, values.arguments)
        ]
        # Triton adds pointers to memory of its own, for which these kernels have no use.
        parameters += [0] * (len(kernel.parameters) - len(parameters))
        launch = (_programs(grid), parameters, memory, compiled.metadata.shared, seed)
        key = _key(text, change, launch)
        if results is not None and key in results:
            for region, content in zip(memory.regions, results[key], strict=True):
                region.content[:] = content
            launches.append(Launch(compiled.hash, kernel, None))
            return
        machine = Machine(change(kernel) if change else kernel, *launch)
        launches.append(Launch(compiled.hash, kernel, machine))
        machine.run()
        _check(machine)
        if results is not None:
            results[key] = [region.content.copy() for region in memory.regions]

    driver.set_active(NoGPU(GPUTarget("cuda", capability, 32)))
    with (
        mock.patch.object(JITFunction, "run", execute),
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _without_assembler),
    ):
        yield launches


def _without_assembler(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """A hook of Triton's compiler: it takes out ptxas, half of the time, whose output nobody
    executes. Called without stages, it names what is so compiled in the cache.
    """
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return ("without ptxas", "without ptxas")


def _key(text: str, change: object, launch: tuple[Any, ...]) -> bytes:
    programs, parameters, memory, *others = launch
    digest = hashlib.sha256(repr((text, change, programs, parameters, others)).encode())
    for region in memory.regions:
        digest.update(region.content)
    return digest.digest()


def _programs(grid: tuple[int, ...]) -> int:
    programs, *others = grid
    if others not in ([], [1], [1, 1]):
        raise PtxError(f"expected a grid of one dimension, got {grid}")
    return programs


def _flatten(kinds: Any, values: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of each argument that is passed at run time; tuples are taken apart."""
    for name, kind in kinds.items():
        if isinstance(kind, tuple):
            parts = (dict(enumerate(part)) for part in (kind, values[name]))
            yield from ((f"{name}.{n}", k, v) for n, k, v in _flatten(*parts))
        elif kind != "constexpr":
            yield name, kind, values[name]


def _bits(memory: GlobalMemory, name: str, kind: str, value: Any) -> int:
    """An argument as the kernel gets it."""
    if kind.startswith("*"):
        return memory.place(name, value)
    if kind in FLOAT_FORMATS:
        return int.from_bytes(struct.pack(FLOAT_FORMATS[kind], value), "little")
    return int(value) % (1 << INTEGER_BITS[kind])


def _check(machine: Machine) -> None:
    """What is written and not read is written once; else, no races; counters are back at 0."""
    regions = machine.memory.regions
    for region in (machine.shared, *regions):
        if region is not machine.shared and region.is_output:
            region.check_stored_once()
        else:
            check_races(region, machine.atomics, machine.kernel.threads)
    for region in regions:
        for access in region.accesses:
            if access.kind == "atomic" and region.load(access.offsets, access.width).any():
                raise PtxError(f"{region.name}: a counter is not left at 0")
