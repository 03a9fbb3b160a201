"""The rows of a comparison: first whether an implementation is right, then what it asks of the
device, then how long it takes.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layers.cases import PASSES, Case
from layers.exercise import Exercise
from layers.implementations import IMPLEMENTATIONS, synchronized_even_alone
from machine.ranks import Place
from models.networks import NETWORKS
from models.training import Network
from tqdm import tqdm

from measuring.counts import count_calls
from measuring.times import WARMUP, Call, in_cuda_graph, percentiles, time_calls

COPIED_BYTES = 1 << 29  # larger than any cache, small enough to copy many times

Key = tuple[str, str]  # implementation, pass


class Plan(NamedTuple):
    """How cases are measured."""

    implementations: Sequence[str]
    samples: int  # of each implementation and pass
    cuda_graph: bool = False
    passes: Sequence[str] = PASSES
    keep: Callable[[list[dict[str, Any]]], None] | None = None  # the rows so far, after each case


def measure(place: Place, cases: list[Case], plan: Plan) -> list[dict[str, Any]]:
    """Measure the cases on this rank; all ranks of the default process group make the call, and
    all get the same rows.
    """
    measured: list[dict[str, Any]] = []
    roof = copy_bytes_per_second(place.device, plan.samples) if on_gpu(place) else None
    # backward runs on the stream of its forward, and the default one cannot be captured
    stream = torch.cuda.Stream(place.device) if on_gpu(place) else None
    with torch.cuda.stream(stream), synchronized_even_alone():
        for case in tqdm(cases, unit="case", disable=place.rank != 0, dynamic_ncols=True):
            rows, calls = check(place, case, plan)
            for key, figures in figures_of(place, calls, plan).items():
                rows[key] |= figures
                if roof and key[1] in PASSES:
                    bytes_per_second = case.bytes_of_pass(key[1]) / (figures["us_p50"] * 1e-6)
                    rows[key]["copy_fraction"] = bytes_per_second / roof
            measured += [{**row, "copy_bytes_per_s": roof} for row in rows.values()]
            if plan.keep is not None and place.rank == 0:
                plan.keep(measured)
    return measured


def on_gpu(place: Place) -> bool:
    """Whether ranks are GPUs."""
    return place.device.type == "cuda"


def check(
    place: Place, case: Case, plan: Plan
) -> tuple[dict[Key, dict[str, Any]], dict[Key, Call]]:
    """The rows of a case without figures, and the calls of what is right."""
    contest: Network | Exercise = (Network if case.suite in NETWORKS else Exercise)(case, place)
    rows: dict[Key, dict[str, Any]] = {}
    calls: dict[Key, Call] = {}
    timer = "host clock"
    if on_gpu(place):
        timer = f"{'CUDA graph' if plan.cuda_graph else 'device events'}, cold L2"
    for name in plan.implementations:
        found = IMPLEMENTATIONS[name]
        try:
            error, passes = contest.enter(found)
        except Exception as failure:  # the compiler's
            if not found.compiled:
                raise
            warn_once(f"{name} is left out: {failure}")
            continue
        errors: list[Any] = [None] * place.world_size
        dist.all_gather_object(errors, error)
        error = None if error is None else max(errors)
        for pass_name in plan.passes:
            rows[name, pass_name] = {
                **{**case._asdict(), "shape": case.shape_name, "impl": name, "pass": pass_name},
                **{"timer": timer, "error_over_tolerance": error},
            }
            if error is None or error <= 1.0:
                calls[name, pass_name] = passes[pass_name]
    return rows, calls


def warn_once(message: str) -> None:
    """Say on the first line why something is left out: Python shows the same warning once."""
    warnings.warn(message.strip().splitlines()[0], stacklevel=2)


def figures_of(place: Place, calls: dict[Key, Call], plan: Plan) -> dict[Key, dict[str, Any]]:
    """What is counted and timed of calls."""
    device = place.device
    for _ in range(WARMUP if on_gpu(place) else 1):  # a CPU has no clock to raise
        for call in calls.values():
            call()
    counts = count_calls(calls, device)
    peaks = {key: peak_megabytes(call, device) for key, call in calls.items() if on_gpu(place)}
    timed = dict(calls)
    for key, call in calls.items() if plan.cuda_graph else ():
        try:
            timed[key] = in_cuda_graph(call, device)
        except RuntimeError as failure:
            del timed[key]
            warn_once(f"{key[0]} is left out, as it cannot be captured: {failure}")
    # the calls themselves are warm, their graphs are not
    times = time_calls(timed, device, plan.samples, warmup=1)
    figures = {}
    for key, seconds in times.items():
        p20, p50, p80 = percentiles(seconds.device)
        figures[key] = {
            **{"samples": plan.samples, "us_p20": p20, "us_p50": p50, "us_p80": p80},
            "host_us": percentiles(seconds.host)[1],
            "peak_mb": peaks.get(key),
            **counts[key]._asdict(),
        }
    return figures


def peak_megabytes(call: Call, device: torch.device) -> float:
    """Megabytes (10**6 bytes) of a GPU in use at the peak of a call, above what is there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) * 1e-6


def copy_bytes_per_second(device: torch.device, samples: int) -> float:
    """What a copy reads and writes in a second, by the median; of the slowest rank, all copying at
    the same time.
    """
    source = torch.zeros(COPIED_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = time_calls({"copy": lambda: target.copy_(source)}, device, samples)
    return 2 * COPIED_BYTES / (percentiles(copied["copy"].device)[1] * 1e-6)
