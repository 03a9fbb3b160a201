"""Processes that compile and execute: where Triton interprets kernels, it cannot compile them."""

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch

if TYPE_CHECKING:  # what imports the kernels does so in the workers
    from compiler.costs import Cost
    from executor.launch import Results

    from .errors import Error
    from .mutations import Mutation
    from .variants import Variant

SEEDS = (None, 1)  # in step, and in another order
# Objects. Compiling and executing make millions that stay for a launch: by default, looking through
# them takes half of the time.
COLLECTED_EACH = 200_000
KERNELS = ("moments", "normalize", "grad_moments", "grad_input")


class Outcome(NamedTuple):
    """Of one execution of a variant: its errors, or the fault that stopped it."""

    variant: str
    capability: int
    seed: int | None
    errors: list["Error"]
    fault: str
    kernels: frozenset[str] = frozenset()  # of all that were launched, the hashes
    launches: int = 0
    repeated: int = 0  # of them, those found among the results of another architecture

    def complaints(self) -> list[str]:
        """What is wrong."""
        if self.fault:
            return [self.fault]
        return [
            f"{e.kernel} {e.what} {e.dtype}: {e.error:.3g}" for e in self.errors if not e.error <= 1
        ]


class Trial(NamedTuple):
    """Of one mutation: what noticed it, or nothing."""

    variant: str
    kernel: str
    mutation: str
    barrier: bool
    warps: int
    noticed: str
    explanation: str  # of what was not noticed


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that compile, whatever Triton does in this one."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        concurrent.futures.ProcessPoolExecutor(jobs, context, _prepare) as executor,
    ):
        yield executor


def _prepare() -> None:
    gc.freeze()
    gc.set_threshold(COLLECTED_EACH)
    torch.set_num_threads(1)
    # torch.empty returns NaN, or the largest integer
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def execute(
    variants: Sequence["Variant"],
    capabilities: Sequence[int],
    seeds: Sequence[int | None] = SEEDS,
) -> list[Outcome]:
    """Run variants, in each of the orders, on each architecture; sums of products are contracted in
    all orders but the first. What two architectures have in common runs once.
    """
    return [
        outcome
        for variant in variants
        for seed in seeds
        for results in [{}]
        for capability in capabilities
        for outcome in [_execute(variant, capability, seed, results)]
    ]


def _execute(variant: "Variant", capability: int, seed: int | None, results: "Results") -> Outcome:
    from executor.contraction import contract
    from executor.parsing import PtxError

    from .variants import run

    label = str(variant), capability, seed
    change = None if seed is None else contract
    try:
        errors, launches = run(variant, capability, seed, change=change, results=results)
    except PtxError as error:
        return Outcome(*label, [], str(error))
    repeated = sum(launch.machine is None for launch in launches)
    hashes = frozenset(launch.compiled for launch in launches)
    return Outcome(*label, errors, "", hashes, len(launches), repeated)


def execute_few(capability: int, chosen: slice) -> list[Outcome]:
    """Run some of the few variants."""
    from .variants import few_variants

    return execute(few_variants()[chosen], [capability])


def notice_what_is_left_out(name: str, opcode: str, which: int | str) -> str:
    """What notices that an instruction is left out, of a kernel of several warps and programs, or
    why nothing does. Of those whose opcode begins so, the one of that number, or the last before
    another opcode.
    """
    from .mutations import Mutation
    from .survivors import explain
    from .variants import few_variants, run

    variant = few_variants()[0]
    _, (launch,) = run(variant, 90, None, name)
    opcodes = [instruction.opcode for instruction in launch.kernel.instructions]
    places = [n for n, found in enumerate(opcodes) if found.startswith(opcode)]
    if isinstance(which, str):
        end = next(n for n, found in enumerate(opcodes) if found.startswith(which))
        place = max(n for n in places if n < end)
    else:
        place = places[which]
    mutation = Mutation("", place, None)
    noticed = _noticed([variant], 90, name, mutation)
    return noticed or explain([variant], 90, name, launch.kernel, mutation)


def race_of_counter() -> list[str]:
    """What is wrong where many warps weight channels with the counter of batches."""
    from . import variants

    many_channels = variants.Variant((2, 300, 3), warps=4, momentum=None)
    outcomes = execute([many_channels], [90])
    return [text for outcome in outcomes for text in outcome.complaints()]


def costs(layer: str, layout: str, capability: int) -> dict[str, "Cost"]:
    """Of the kernels of a layer in bfloat16."""
    from compiler.costs import cost_of
    from layers.cases import read_cases, suites
    from triton_syncbn.kernels.indexing import geometry
    from triton_syncbn.kernels.launch_config import default_config

    from .variants import ARCHITECTURES

    (case,) = (c for c in read_cases(suites(), ["bf16"], [layout]) if c.layer == layer)
    shape = geometry(case.without_memory())
    configs = {name: default_config(name, shape, ARCHITECTURES[capability]) for name in KERNELS}
    return {name: cost_of(name, case, configs[name], capability) for name in KERNELS}


def mutate(variants: Sequence["Variant"], capability: int, changes: int) -> list[Trial]:
    """Leave out each barrier in turn, and make so many other changes to the kernels, which all the
    variants have in common.
    """
    from .mutations import draw, without_barriers
    from .survivors import explain
    from .variants import run

    kernels = {}
    for name in KERNELS:
        launches = [run(v, capability, None, name, like=variants[0])[1] for v in variants]
        assert len({launch.compiled for (launch,) in launches}) == 1, f"{name}: {variants}"
        kernels[name] = launches[0][0].kernel
    work = [
        (name, mutation, True)
        for name, kernel in kernels.items()
        for mutation in without_barriers(kernel)
    ]
    dice = random.Random(0)
    for _ in range(changes):
        name = dice.choice(KERNELS)
        work.append((name, draw(kernels[name], dice), False))
    trials = []
    for name, mutation, barrier in work:
        noticed = _noticed(variants, capability, name, mutation)
        why = "" if noticed else explain(variants, capability, name, kernels[name], mutation)
        label = str(variants[0]), name, mutation.words, barrier, kernels[name].threads // 32
        trials.append(Trial(*label, noticed, why))
    return trials


def _noticed(
    variants: Sequence["Variant"], capability: int, name: str, mutation: "Mutation"
) -> str:
    from .survivors import execute

    for variant in variants:
        for seed in SEEDS:
            found = execute(variant, variants[0], capability, seed, name, mutation)
            if found.noticed:
                return found.noticed
    return ""
