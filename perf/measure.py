"""The rows of one layer: first whether an implementation is right, then what it asks of the device,
then how long it takes.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from correctness import error_over_tolerance, make_inputs
from counting import count_calls
from implementations import Implementation, implementations
from memory import peak_megabytes
from passes import TRANSFERS, calls_of_passes
from timing import WARMUP, Call, in_cuda_graph, percentiles, time_calls

Key = tuple[str, str]  # implementation, pass


class Measurement:
    """What is the same for all layers: the options, the place of this rank, the copy roof."""

    def __init__(
        self,
        options: argparse.Namespace,
        rank: int,
        world_size: int,
        device: torch.device,
        copy_roof: float,
    ) -> None:
        self.options = options
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.copy_roof = copy_roof  # bytes per second
        self.failures: dict[str, str] = {}  # of what cannot run here: the first reason

    @property
    def timer(self) -> str:
        """How device times are taken, as rows say it."""
        if self.device.type != "cuda":
            return "host clock"
        what = "CUDA graph" if self.options.cuda_graph else "device events"
        return f"{what}, {'warm cache' if self.options.warm_cache else 'cold L2'}"

    def rows_of(self, case: Case) -> list[dict[str, Any]]:
        """A row for each implementation and pass; what is wrong has no time."""
        calls: dict[Key, Call] = {}
        rows: dict[Key, dict[str, Any]] = {}
        input, grad_output = make_inputs(case, self.rank, self.world_size, self.device)[:2]
        for name, found in implementations(self.device, self.options.impl).items():
            try:
                layer, error = self._made_and_checked(found, case)
            except Exception as failure:  # the compiler's or another package's
                if not found.may_fail:
                    raise
                self.failures.setdefault(name, f"{case.layer}: {_first_line(failure)}")
                continue
            passes = calls_of_passes(layer, input, grad_output, found.in_place)
            for pass_name in self.options.passes:
                rows[name, pass_name] = {
                    **{"impl": name, "pass": pass_name, "suite": case.suite, "layer": case.layer},
                    **{"shape": case.shape_name, "dtype": case.dtype, "layout": case.layout},
                    **{"timer": self.timer, "error_over_tolerance": error},
                }
                if error <= 1.0:
                    calls[name, pass_name] = passes[pass_name]
        for key, figures in self._figures(case, calls).items():
            rows[key] |= figures
        return list(rows.values())

    def _made_and_checked(self, found: Implementation, case: Case) -> tuple[torch.nn.Module, float]:
        """A layer, and the largest error of all ranks."""
        layer = found.make(case.shape[1]).to(self.device)
        error = error_over_tolerance(
            layer,
            case,
            self.rank,
            self.world_size,
            self.device,
            synchronized=found.synchronized,
            in_place=found.in_place,
        )
        errors: list[Any] = [None] * self.world_size
        dist.all_gather_object(errors, error)
        return layer, max(errors)

    def _figures(self, case: Case, calls: dict[Key, Call]) -> dict[Key, dict[str, Any]]:
        for _ in range(WARMUP):
            for call in calls.values():
                call.work(call.prepare())
        counts = count_calls(calls, self.device)
        peaks = {key: peak_megabytes(call, self.device) for key, call in calls.items()}
        timed = time_calls(
            self._as_timed(calls),
            self.device,
            self.options.samples,
            warmup=1,  # of a graph; the calls themselves are warm
            warm_cache=self.options.warm_cache,
        )
        figures = {}
        for key, seconds in timed.items():
            p20, p50, p80 = percentiles(seconds.device)
            bytes_per_second = TRANSFERS[key[1]] * case.bytes / (p50 * 1e-6)
            figures[key] = {
                **{"samples": self.options.samples, "us_p20": p20, "us_p50": p50, "us_p80": p80},
                "host_us": percentiles(seconds.host)[1],
                "gbytes_per_s": bytes_per_second * 1e-9,
                "copy_fraction": bytes_per_second / self.copy_roof,
                "peak_mb": peaks[key],
                **counts[key]._asdict(),
            }
        return figures

    def _as_timed(self, calls: dict[Key, Call]) -> dict[Key, Call]:
        """The calls themselves, or graphs of those that can be captured."""
        if not self.options.cuda_graph:
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
