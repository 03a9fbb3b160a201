"""How exact a training step is: hard data, what it is held to, and the table in ACCURACY.md.

python tests/accuracy.py                   write tests/ACCURACY.md
python tests/accuracy.py --examples 1000   draw so many cases, and stop at one that is not exact
"""

import argparse
import contextlib
import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import hypothesis
import numpy as np
import torch
import torch.nn.functional as F
import triton
from hypothesis import strategies
from torch import Tensor

from tests import interpreter, oracle
from triton_syncbn import SyncBN, cpu, reference

MOMENTUM = 0.1
# Two implementations that are both this good differ in how their last roundings fall: 6e-8 is the
# rounding of one float32 operation, and a result has three or so.
NOISE = 2e-7
# Sums of squares are sent as float64, so mean**2 * 2**-53 is lost of var + eps, a few times over.
# Up to this ratio of mean and sqrt(var + eps) that is below 2e-7.
LARGEST_RATIO = 1.1e4
ROUNDINGS_OF_MOMENTS = 8  # of float64, in the sums of ranks, the mean, its square and the quotients
LONGEST_CHAIN_OF_THREAD = 16  # values of a float32 tile of the default config that a thread holds
PLAIN = {"reference": reference, "cpu": cpu}  # in torch alone
COMPARED = ("output", "grad_input", "running_mean", "running_var")


class Case(NamedTuple):
    """A whole batch and how it is split: rank r holds sizes[r] of the samples."""

    input: Tensor
    grad_output: Tensor
    weight: Tensor | None
    bias: Tensor | None
    sizes: tuple[int, ...]
    eps: float = 1e-5
    channels_last: bool = False

    def __repr__(self) -> str:
        size, dtype = tuple(self.input.shape), self.input.dtype
        return f"Case({size}, {dtype}, {self.sizes}, {self.eps=}, {self.channels_last=})"


def make_case(
    sizes: tuple[int, ...] = (8,),
    channels: int = 4,
    spatial: tuple[int, ...] = (7, 7),
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
    apart: float = 0.0,
    outlier: bool = False,
    grad_mean: float = 0.0,
    affine: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Normal data. `mean` and `apart`, the step from one rank's mean to the next, are in units of
    std; with std = 0 every channel is constant. An outlier comes first in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(sizes), channels, *spatial)
    values, grads = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    weight, bias = torch.randn((2, channels), generator=generator)
    rank = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    values += mean + apart * rank.view(-1, *[1] * (len(shape) - 1))
    values = values * std if std else torch.full_like(values, 0.7)
    if outlier and values.numel():
        values.view(-1)[0] = 3e4 * max(std, 1e-6)
    values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    parameters = (weight, bias) if affine else (None, None)
    return Case(values.to(dtype), (grads + grad_mean).to(dtype), *parameters, sizes, **options)


@strategies.composite
def cases(draw: Callable[..., Any], most_ranks: int = 5, most_elements: int = 4000) -> Case:
    """Any case: small enough for the interpreter, at every edge of shapes and data."""
    spatial = draw(strategies.sampled_from([(7, 7), (), (1, 1), (5,), (1,), (3, 5), (2, 3, 5)]))
    channels = draw(strategies.sampled_from([1, 2, 3, 5, 31, 257]))
    positions = torch.Size(spatial).numel()
    room = max(most_elements // (channels * positions), 2)
    sizes = draw(strategies.lists(strategies.integers(0, 9), min_size=1, max_size=most_ranks))
    while sum(sizes) > room:
        sizes = [size // 2 for size in sizes]
    if most_ranks == 1 and sizes[0] * positions == 1:
        sizes = [2]  # a process that is alone must have more than one value a channel
    data = draw(
        strategies.sampled_from(
            [
                {},
                {"mean": 1e2},
                {"mean": 1e4},
                {"mean": -1e6},
                {"mean": 1e3, "std": 1e-6},
                {"std": 1e-6},
                {"std": 1e4},
                {"std": 0.0},
                {"apart": 1e3},
                {"outlier": True},
            ]
        )
    )
    return make_case(
        tuple(sizes),
        channels,
        spatial,
        draw(strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        grad_mean=draw(strategies.sampled_from([0.0, 1e3])),
        affine=draw(strategies.booleans()),
        seed=draw(strategies.integers(0, 2**16)),
        eps=draw(strategies.sampled_from([1e-5, 1e-12, 1e-8, 1e-3, 1e-1])),
        # apart in memory, each channel is a program of the interpreter
        channels_last=channels > 31 or draw(strategies.booleans()),
        **data,
    )


def parts(case: Case, *tensors: Tensor) -> list[list[Tensor]]:
    """The share of each rank in tensors of the whole batch, dense in the case's layout."""
    ranks = zip(*(tensor.split(case.sizes) for tensor in tensors), strict=True)
    dense = (
        (lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1))
        if case.channels_last
        else (lambda t: t.contiguous())
    )
    return [[dense(tensor) for tensor in rank] for rank in ranks]


def train_layer(rank: int, world_size: int, case: Case) -> oracle.Result:
    """What SyncBN makes of a rank's part. Statistics start at 0, so their own digits are seen."""
    input, grad_output = parts(case, case.input, case.grad_output)[rank]
    layer = SyncBN(input.shape[1], case.eps, MOMENTUM, affine=case.weight is not None)
    layer.running_var.zero_()
    if case.weight is not None:
        layer.weight.data, layer.bias.data = case.weight.clone(), case.bias.clone()
    with sums_as_on_a_gpu():
        output = layer(input.requires_grad_())
        output.backward(grad_output)
    return oracle.Result(
        output.detach(),
        input.grad,
        running_mean=layer.running_mean,
        running_var=layer.running_var,
    )


def joined(results: list[oracle.Result]) -> oracle.Result:
    """The ranks' results as that of one process; statistics must be the same to the last bit."""
    for result in results[1:]:
        assert torch.equal(result.running_mean, results[0].running_mean)
        assert torch.equal(result.running_var, results[0].running_var)
    output, grad_input = (
        torch.cat([getattr(result, name) for result in results]) for name in COMPARED[:2]
    )
    statistics = {name: getattr(results[0], name) for name in COMPARED[2:]}
    return oracle.Result(output, grad_input, **statistics)


@contextlib.contextmanager
def sums_as_on_a_gpu() -> Iterator[None]:
    """Sum tiles in the interpreter as threads do: a chain in each, and a tree over the threads.

    numpy adds up the rows of a tile one after the other, and loses digits that no GPU loses.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import ReduceOps

    plain = ReduceOps.sum

    def total(self: Any, tile: Any) -> Any:
        if self.axis is None:  # of integers
            return plain(self, tile)
        data = np.moveaxis(tile.handle.data, self.axis, 0)
        chain = min(len(data), LONGEST_CHAIN_OF_THREAD)
        data = data.reshape(chain, len(data) // chain, *data.shape[1:]).sum(0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        data = np.moveaxis(data, 0, self.axis) if self.keep_dims else data[0]
        return self.to_tensor(data, tile.dtype)

    with mock.patch.object(ReduceOps, "sum", total):
        yield


@sums_as_on_a_gpu()
def train_steps(implementation: str, case: Case, copies: float = 1) -> oracle.Result:
    """The four steps of "kernels", "reference" or "cpu" for each rank in turn, their sums added up
    here, and multiplied as if there were so many copies of the batch.
    """

    def step(name: str) -> Callable[..., Any]:
        if implementation in PLAIN:
            return getattr(PLAIN[implementation], name)
        return getattr(importlib.import_module(f"triton_syncbn.kernels.{name}"), name)

    ranks = parts(case, case.input, case.grad_output)
    moments = copies * sum(step("moments")(input) for input, _ in ranks)
    sums = copies * sum(
        step("grad_moments")(grad, input, moments, None, None, case.eps)[0] for input, grad in ranks
    )
    results = []
    for input, grad in ranks:
        mean, variance = torch.zeros((2, input.shape[1])).unbind()
        affine = case.weight, case.bias
        output = step("normalize")(
            input,
            moments,
            *affine,
            running_mean=mean,
            running_var=variance,
            momentum=MOMENTUM,
            eps=case.eps,
        )
        grad_input = step("grad_input")(grad, input, moments, sums, case.weight, case.eps)
        results.append(oracle.Result(output, grad_input, running_mean=mean, running_var=variance))
    return joined(results)


def train_torch(case: Case) -> oracle.Result:
    """torch's float32 batch norm of the whole batch, the arithmetic of torch.nn.BatchNorm2d."""
    input = case.input.clone().requires_grad_()
    mean, variance = torch.zeros((2, input.shape[1])).unbind()
    output = F.batch_norm(input, mean, variance, case.weight, case.bias, True, MOMENTUM, case.eps)
    output.backward(case.grad_output)
    return oracle.Result(output.detach(), input.grad, running_mean=mean, running_var=variance)


def per_channel(value: Tensor, case: Case) -> Tensor:
    return value.view(-1, *[1] * (case.input.dim() - 2))


def exact_result(case: Case) -> oracle.Result:
    """The float64 oracle, on deviations from each channel's mean, so that it does not cancel."""
    channels, count = case.input.shape[1], case.input.numel() // case.input.shape[1]
    zeros = torch.zeros(channels, dtype=torch.float64)
    if count == 0:
        none = case.input.double()
        return oracle.Result(none, none, running_mean=zeros, running_var=zeros)
    if count == 1:  # which torch refuses: x is its own mean, and what there is of y is the bias
        bias = zeros if case.bias is None else case.bias.double()
        output = per_channel(bias, case).expand_as(case.input)
        mean = MOMENTUM * case.input.double().view(channels)
        return oracle.Result(output, torch.zeros_like(output), running_mean=mean, running_var=zeros)
    value = case.input.double()
    shift = value.mean([0, *range(2, value.dim())]).to(case.input.dtype).double()
    exact = oracle.batch_norm(
        value - per_channel(shift, case),
        case.grad_output,
        case.weight,
        case.bias,
        MOMENTUM,
        case.eps,
    )
    exact.running_mean += MOMENTUM * shift
    # The oracle's own starts at 1, next to which a small one has no digits.
    deviation = value - per_channel(shift, case)
    exact.running_var = MOMENTUM * deviation.var([0, *range(2, value.dim())])
    return exact


class Scale(NamedTuple):
    """What errors are measured against, and what the float64 moments cannot hold of it."""

    norms: dict[str, float]
    grad_terms: Tensor  # weight * rstd * dy, the largest term of dx
    lost: float  # relative, of y and dx
    lost_of_variance: float


def scale_of(case: Case, exact: oracle.Result) -> Scale:
    others = [0, *range(2, case.input.dim())]
    value = case.input.double()
    mean = value.mean(others)
    variance = (value - per_channel(mean, case)).square().mean(others)
    variance = torch.where(value.amax(others) == value.amin(others), 0.0, variance)
    gain = torch.ones_like(mean) if case.weight is None else case.weight.double().abs()
    grad_terms = case.grad_output.double() * per_channel(gain * (variance + case.eps).rsqrt(), case)

    def lost(spread: Tensor) -> float:
        square = (mean.square() / spread).max().item()
        return ROUNDINGS_OF_MOMENTS * 2**-53 * square if square > LARGEST_RATIO**2 else 0.0

    norms = {
        # a channel of one value has y = 0 without a bias: measured against one deviation
        "output": exact.output.norm().item()
        or per_channel(gain, case).expand_as(value).norm().item(),
        "grad_input": max(exact.grad_input.norm().item(), grad_terms.norm().item()),
        # a mean that is itself small is a sum that cancels, of terms as large as the deviation
        "running_mean": MOMENTUM * torch.maximum(mean.abs(), variance.sqrt()).norm().item(),
        "running_var": exact.running_var.norm().item() or MOMENTUM * case.eps,
    }
    return Scale(
        norms,
        grad_terms,
        lost(variance + case.eps),
        lost(torch.where(variance > 0.0, variance, case.eps)),
    )


def error(name: str, actual: oracle.Result, exact: oracle.Result, scale: Scale) -> float:
    """Norm of the difference over the norm of what it is measured against."""
    difference = getattr(actual, name).double() - getattr(exact, name)
    return difference.norm().item() / max(scale.norms[name], 1e-300)


def faults(case: Case, ours: oracle.Result) -> list[str]:
    """Where a result is not as exact as promised: a line each."""
    if case.input.numel() == 0:
        moved = ours.running_mean.any() or ours.running_var.any() or ours.output.numel()
        return ["an empty batch left a trace"] if moved else []
    exact = exact_result(case)
    scale = scale_of(case, exact)
    single = case.input.numel() == case.input.shape[1]  # torch refuses one value a channel
    theirs = None if single or case.input.dtype != torch.float32 else train_torch(case)
    found = []
    names = COMPARED if case.input.dtype == torch.float32 else COMPARED[2:]
    for name in names:
        limit = NOISE + (scale.lost_of_variance if name == "running_var" else scale.lost)
        if theirs is not None:
            limit = max(limit, error(name, theirs, exact, scale))
        mine = error(name, ours, exact, scale)
        if not mine <= limit:
            found.append(f"{name}: {mine:.2e} is above {limit:.2e}")
    if case.input.dtype != torch.float32:
        found += faults_in_half(case, ours, exact, scale)
    return found


def faults_in_half(
    case: Case, ours: oracle.Result, exact: oracle.Result, scale: Scale
) -> list[str]:
    """Off by more than a unit in the last place of the rounded float64 result, unless the element
    cancels: then by more than 1e-6 of the largest of its terms in the channel.
    """
    others = [0, *range(2, case.input.dim())]
    bias = torch.zeros(1) if case.bias is None else case.bias
    offset = per_channel(bias.double().expand(case.input.shape[1]), case).expand_as(exact.output)
    terms = torch.maximum((exact.output - offset).abs(), offset.abs())
    found = []
    for name, largest in (("output", terms), ("grad_input", scale.grad_terms.abs())):
        actual = getattr(ours, name)
        rounded = getattr(exact, name).to(actual.dtype)
        same = actual == rounded  # and both may be beyond the largest half-precision number
        actual, rounded = (torch.where(same, 0.0, tensor) for tensor in (actual, rounded))
        negligible = (1e-6 + scale.lost) * largest.amax(others, keepdim=True)
        units = oracle.error_in_ulp(actual, rounded.double(), negligible)
        if not units <= 1.0:
            found.append(f"{name}: {units:.1f} units in the last place")
    return found


HARD_CASES: dict[str, dict[str, Any]] = {
    "normal data": {},
    "mean / std = 1e2": {"mean": 1e2},
    "mean / std = 1e4": {"mean": 1e4},
    "mean / std = 1e6": {"mean": 1e6},
    "means of ranks 1000 std apart": {"apart": 1e3},
    "outlier first": {"outlier": True},
    "var << eps": {"std": 1e-6},
    "constant channels": {"std": 0.0},
    "dy with a mean of 1000 std": {"grad_mean": 1e3},
    "2**18 values a channel": {"sizes": (2, 2), "channels": 1, "spatial": (256, 256)},
    "bfloat16": {"dtype": torch.bfloat16},
}


def hard_case(name: str, seed: int) -> Case:
    return make_case(**{"sizes": (5, 0, 3), "seed": seed, **HARD_CASES[name]})


def measure(name: str, seeds: int) -> dict[str, tuple[float, float, float]]:
    """The worst errors of the kernels, of the reference and of torch in a hard case."""
    worst = dict.fromkeys(COMPARED, (0.0, 0.0, 0.0))
    for seed in range(seeds):
        case = hard_case(name, seed)
        exact = exact_result(case)
        scale = scale_of(case, exact)
        results = train_steps("kernels", case), train_steps("reference", case), train_torch(case)
        for compared in COMPARED:
            errors = (error(compared, result, exact, scale) for result in results)
            worst[compared] = tuple(map(max, worst[compared], errors))
    return worst


TITLE = """# How exact it is

Made by `python tests/accuracy.py`; {versions}.

The worst of {seeds} batches: norm of the error over the norm of the float64 result; for dx over
that of its largest term, weight * rstd * dy; for running_mean over that of max(|mean|, std) of the
channels. *Kernels* (in Triton's interpreter) and *plain torch* are ours, with the samples on three
ranks, one of them empty; *torch* is torch.nn.BatchNorm2d on this CPU, with all samples in one
process. All are float32, those of the last row bfloat16. *Ratio* is torch's error over that of
the kernels. Errors under 2e-7 are the last roundings of float32; a ratio of two such is chance.

Running statistics start at 0 here, so that their digits are those of the batch. At mean / std = 1e6
float32 holds x itself to 3% of a deviation, and the float64 sum of squares that ranks send holds
the variance to some 1e-4: y, dx and running_var keep all their digits up to mean / sqrt(var + eps)
= 1e4.

| case | | kernels | plain torch | torch | ratio |
|---|---|---|---|---|---|
"""
SHORT = {"output": "y", "grad_input": "dx"}


def report(seeds: int) -> str:
    """The text of ACCURACY.md."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = pathlib.Path(__file__).parent
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, commit {commit}"
    lines = []
    for case in HARD_CASES:
        for compared, (kernels, plain, theirs) in measure(case, seeds).items():
            name = SHORT.get(compared, compared)
            ratio = f"{theirs / kernels:.2g}" if kernels else "-"
            lines.append(
                f"| {case} | {name} | {kernels:.1e} | {plain:.1e} | {theirs:.1e} | {ratio} |\n"
            )
            case = ""
    return TITLE.format(versions=versions, seeds=seeds) + "".join(lines)


def sweep(examples: int) -> None:
    """Draw cases and check both implementations."""

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases())
    def check(case: Case) -> None:
        for implementation in ("kernels", "reference"):
            found = faults(case, train_steps(implementation, case))
            assert not found, f"{implementation}: {found}"

    check()
    print(f"{examples} cases: all exact")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, help="check so many cases, write nothing")
    parser.add_argument("--seeds", type=int, default=5, help="batches of each row of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    interpreter.round_to_nearest_bfloat16()
    if arguments.examples:
        sweep(arguments.examples)
    else:
        pathlib.Path(__file__).with_name("ACCURACY.md").write_text(report(arguments.seeds))
