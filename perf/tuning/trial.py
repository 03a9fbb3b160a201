"""Every candidate of a bucket tried: whether it is right, and whether it beats the default."""

import functools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from layers.cases import DTYPES, Case, laid_out
from layers.exercise import TOLERANCE
from layers.steps import Operands, run_step
from measuring.times import Name, percentiles, time_calls
from numerics.oracle import relative_error
from torch import Tensor
from tqdm import tqdm
from triton_syncbn.kernels.launch_config import (
    REDUCTIONS,
    WRITERS,
    LaunchConfig,
    multiprocessors,
)

from tuning.candidates import Job, candidates

REDUCTIONS_TOLERANCE = 1e-5  # of the norm of the sums of sizes; float64 has that of a map
GAIN = 0.03  # of the time of the default, in every round
ROUNDS = 3
FIRST_SAMPLES = 8  # of a candidate in a first round over all of them
FINALISTS = 4  # the fastest of it, which meet the default in the rounds
SAMPLES = 30  # of a finalist in a round
CYCLES_AHEAD = 200_000  # some 0.1 ms


@functools.lru_cache(maxsize=1)
def operands_of(case: Case, device: torch.device) -> tuple[Operands, Operands]:
    """What the kernels of a layer are given, and the same in float64."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) + 0.5

    x, dy = (laid_out(draw(*case.shape).to(DTYPES[case.dtype]), case.layout) for _ in range(2))
    weight, bias, mean, variance = draw(4, case.shape[1]).unbind()
    exact = Operands(x.double(), dy.double(), weight=weight.double(), bias=bias.double())
    exact = exact._replace(moments=run_step("moments", exact, "reference"))
    exact = exact._replace(grad_moments=run_step("grad_moments", exact, "reference"))
    counter = torch.tensor(0, device=device)
    sums = exact.moments, exact.grad_moments
    return Operands(x, dy, *sums, weight, bias, mean, variance, counter), exact


class KernelOfLayer:
    """A kernel of a layer, launched alone, and what it has to make of its operands."""

    def __init__(self, kernel: str, case: Case, device: torch.device) -> None:
        self.kernel = kernel
        self.tolerance = TOLERANCE[case.dtype]
        if kernel in REDUCTIONS and case.dtype != "fp64":
            self.tolerance = REDUCTIONS_TOLERANCE
        self.operands, exact = operands_of(case, device)
        self.expected = run_step(kernel, exact, "reference")
        # the size of the result, or of the terms of a sum that may cancel
        sizes = exact._replace(grad_output=exact.grad_output.abs())
        terms = run_step(kernel, sizes, "reference") if kernel == "grad_moments" else self.expected
        self.scale = terms.norm().item()
        self.known: tuple[Tensor, float] | None = None  # a result, and its error

    def launch(self, config: LaunchConfig) -> Tensor:
        """Run the kernel once, as the layer does."""
        return run_step(self.kernel, self.operands, config=config)

    def error_of(self, config: LaunchConfig) -> float:
        """Error of a launch in units of what is tolerated; above 1 is wrong."""
        result = self.launch(config)
        if self.known is None or not torch.equal(result, self.known[0]):
            error = relative_error(result, self.expected, self.scale)
            self.known = result, error / self.tolerance
        return self.known[1]

    def prepare(self) -> None:
        """Bring into the cache what it holds when a layer launches the kernel: a map is written
        after a reduction has read it. And keep the device busy until the launch has reached it.
        """
        if self.operands.input.is_cuda:
            torch.cuda._sleep(CYCLES_AHEAD)
        if self.kernel in WRITERS:
            run_step(REDUCTIONS[WRITERS.index(self.kernel)], self.operands)


class Outcome(NamedTuple):
    """What tuning a bucket has found."""

    config: LaunchConfig | None  # None: the default stays
    microseconds: float  # of the config, or of the default; NaN if the default is wrong
    default_microseconds: float
    wrong: int  # candidates
    skipped: int  # candidates that could not be launched
    first: Mapping[LaunchConfig, float] = {}  # microseconds in the first round, the default first


def try_candidates(job: Job, device: torch.device) -> Outcome:
    """Check all candidates of a bucket, and time those that are right."""
    layer = KernelOfLayer(job.bucket.kernel, job.case, device)
    default, *others = candidates(job, multiprocessors(device))
    right: list[LaunchConfig] = []
    wrong = skipped = 0
    for config in (default, *others):
        try:
            error = layer.error_of(config)
        except Exception:  # the compiler, the driver: whatever it is, it is not a config
            skipped += 1
            continue
        if error <= 1.0:
            right.append(config)
        else:
            wrong += 1
            tqdm.write(f"WRONG: {job.bucket} {tuple(config)}: {error:.3g} times the tolerance")
    if default not in right:
        return Outcome(None, float("nan"), float("nan"), wrong, skipped)

    def measure(configs: list[LaunchConfig], samples: int) -> dict[LaunchConfig, float]:
        launches = {config: functools.partial(layer.launch, config) for config in configs}
        times = time_calls(launches, device, samples, warmup=1, before=layer.prepare, of_host=False)
        return {config: percentiles(seconds.device)[1] for config, seconds in times.items()}

    first = measure(right, FIRST_SAMPLES)
    best = finalists(first, default)
    rounds = [measure(best, SAMPLES) for _ in range(ROUNDS if len(best) > 1 else 1)]
    chosen = winner(rounds, default)
    shown = chosen or default
    # of the round in which the config gained least
    least = max(rounds, key=lambda times: times[shown] / times[default])
    return Outcome(chosen, least[shown], least[default], wrong, skipped, first)


def finalists(first: Mapping[Name, float], default: Name) -> list[Name]:
    """The default, and the fastest of those that beat it in a first round over all of them."""
    faster = [name for name in first if first[name] < first[default]]
    return [default, *sorted(faster, key=first.__getitem__)[:FINALISTS]]


def winner(rounds: Sequence[Mapping[Name, float]], default: Name) -> Name | None:
    """The fastest by its median over the rounds, of those that beat the default by `GAIN` in each
    of `ROUNDS` rounds; None where the default stays.
    """
    if len(rounds) < ROUNDS:
        return None
    proven = [
        name
        for name in rounds[0]
        if name != default and all(times[name] <= (1 - GAIN) * times[default] for times in rounds)
    ]
    return min(proven, key=lambda name: median(times[name] for times in rounds), default=None)
