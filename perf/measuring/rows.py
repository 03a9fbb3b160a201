"""The rows of layers: first whether an implementation is right, then what it asks of the device,
then how long it takes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layers.cases import Case
from layers.correctness import Exercise
from layers.implementations import Implementation, implementations, synchronized_even_alone
from machine.ranks import Place
from tqdm import tqdm

from measuring.counts import count_calls
from measuring.memory import copy_bytes_per_second, peak_megabytes
from measuring.passes import PASSES, TRANSFERS, calls_of_passes
from measuring.times import WARMUP, Call, in_cuda_graph, percentiles, time_calls

Key = tuple[str, str]  # implementation, pass


class Plan(NamedTuple):
    """How layers are measured."""

    samples: int  # of each implementation and pass
    implementations: Sequence[str] | None = None  # None: those that a device has
    passes: Sequence[str] = PASSES
    warm_cache: bool = False
    cuda_graph: bool = False

    def timer(self, device: torch.device) -> str:
        """How device times are taken, as rows say it."""
        if device.type != "cuda":
            return "host clock"
        what = "CUDA graph" if self.cuda_graph else "device events"
        return f"{what}, {'warm cache' if self.warm_cache else 'cold L2'}"


class Measured(NamedTuple):
    """What came of it."""

    rows: list[dict[str, Any]]
    copy_roof: float  # bytes per second
    failures: dict[str, str]  # of what cannot run here: the first reason


def measure_layers(place: Place, cases: list[Case], plan: Plan) -> Measured:
    """Measure the layers on this rank; all ranks of the default process group make the call, and
    all get the same rows.
    """
    measurement = Measurement(place, plan)
    rows = []
    with synchronized_even_alone():
        for case in tqdm(cases, unit="layer", disable=place.rank != 0, dynamic_ncols=True):
            rows += measurement.rows_of(case)
    return Measured(rows, measurement.copy_roof, measurement.failures)


class Measurement:
    """What is the same for all layers."""

    def __init__(self, place: Place, plan: Plan) -> None:
        self.place = place
        self.device = place.device
        self.plan = plan
        self.copy_roof = copy_bytes_per_second(place.device, plan.samples)
        self.failures: dict[str, str] = {}

    def rows_of(self, case: Case) -> list[dict[str, Any]]:
        """A row for each implementation and pass; what is wrong has no time."""
        rows, calls = self._checked(case)
        for key, figures in self._figures(case, calls).items():
            rows[key] |= figures
        return list(rows.values())

    def _checked(self, case: Case) -> tuple[dict[Key, dict[str, Any]], dict[Key, Call]]:
        """The rows without figures, and the calls of what is right."""
        calls: dict[Key, Call] = {}
        rows: dict[Key, dict[str, Any]] = {}
        exercise = Exercise(case, self.place)
        for name, found in implementations(self.device, self.plan.implementations).items():
            try:
                layer, error = self._made_and_checked(found, exercise)
            except Exception as failure:  # the compiler's or another package's
                if not found.may_fail:
                    raise
                self.failures.setdefault(name, f"{case.layer}: {_first_line(failure)}")
                continue
            passes = calls_of_passes(layer, exercise.input, exercise.grad_output, found.in_place)
            for pass_name in self.plan.passes:
                rows[name, pass_name] = {
                    **{"impl": name, "pass": pass_name, "suite": case.suite, "layer": case.layer},
                    **{"shape": case.shape_name, "dtype": case.dtype, "layout": case.layout},
                    **{"timer": self.plan.timer(self.device), "error_over_tolerance": error},
                }
                if error <= 1.0:
                    calls[name, pass_name] = passes[pass_name]
        return rows, calls

    def _made_and_checked(
        self, found: Implementation, exercise: Exercise
    ) -> tuple[torch.nn.Module, float]:
        """A layer, and the largest error of all ranks."""
        layer = found.make(exercise.case.shape[1]).to(self.device)
        error = exercise.error_of(layer, synchronized=found.synchronized, in_place=found.in_place)
        errors: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(errors, error)
        return layer, max(errors)

    def _figures(self, case: Case, calls: dict[Key, Call]) -> dict[Key, dict[str, Any]]:
        for _ in range(WARMUP if self.device.type == "cuda" else 1):  # a CPU has no clock to raise
            for call in calls.values():
                call.work(call.prepare())
        counts = count_calls(calls, self.device)
        peaks = {key: peak_megabytes(call, self.device) for key, call in calls.items()}
        timed = time_calls(
            self._as_timed(calls),
            self.device,
            self.plan.samples,
            warmup=1,  # of a graph; the calls themselves are warm
            warm_cache=self.plan.warm_cache,
        )
        figures = {}
        for key, seconds in timed.items():
            p20, p50, p80 = percentiles(seconds.device)
            bytes_per_second = TRANSFERS[key[1]] * case.bytes / (p50 * 1e-6)
            figures[key] = {
                **{"samples": self.plan.samples, "us_p20": p20, "us_p50": p50, "us_p80": p80},
                "host_us": percentiles(seconds.host)[1],
                "gbytes_per_s": bytes_per_second * 1e-9,
                "copy_fraction": bytes_per_second / self.copy_roof,
                "peak_mb": peaks[key],
                **counts[key]._asdict(),
            }
        return figures

    def _as_timed(self, calls: dict[Key, Call]) -> dict[Key, Call]:
        """The calls themselves, or graphs of those that can be captured."""
        if not self.plan.cuda_graph:
            return calls
        graphs = {}
        for key, call in calls.items():
            try:
                graphs[key] = in_cuda_graph(call, self.device)
            except RuntimeError as failure:
                self.failures.setdefault(
                    key[0], f"cannot be captured in a CUDA graph: {_first_line(failure)}"
                )
        return graphs


def _first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip()}".splitlines()[0]
