"""What a pass asks of the device, counted by torch's profiler: launches, waits of the host,
collectives. On a CPU nothing is launched and nothing waits.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from measuring.times import Call, Name

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes into the progress bar

LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cuLaunchCooperative"),
    *("hipLaunchKernel", "hipModuleLaunchKernel", "hipExtLaunchKernel", "hipExtModuleLaunchKernel"),
)
# A copy that the host waits for is followed by one of these, unless it is a plain memcpy.
HOST_SYNCS = {
    f"{runtime}{call}"
    for runtime in ("cuda", "hip")
    for call in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy")
}


class Counts(NamedTuple):
    """Of one pass."""

    launches: int | None  # None on a CPU, and where the profiler does not see the driver
    host_syncs: int | None
    collectives: int


def count_calls(calls: Mapping[Name, Call], device: torch.device) -> dict[Name, Counts]:
    """Counts of one run of each call; run them before, as a first run does more."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    labels = {name: f"counted call {index}" for index, name in enumerate(calls)}
    with profile(activities=activities) as profiler:
        for name, call in calls.items():
            if gpu:
                torch.cuda.synchronize(device)
            with record_function(labels[name]):
                call()
        if gpu:
            torch.cuda.synchronize(device)
    events = list(profiler.events() or [])
    return {name: counts_within(events, label) for name, label in labels.items()}


def counts_within(events: Iterable[Any], label: str) -> Counts:
    """Counts of what the host did while the event of that label lasted, on any of its threads."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (top,) = (event for event in events if event.name == label)
    within = [event for event in events if _inside(event, top)]
    collectives = [event for event in within if event.name.startswith("c10d::")]
    # What a collective calls and what NCCL launches is its own.
    outside = [event for event in within if not any(_inside(event, other) for other in collectives)]
    counted = sum(event in outside for event in collectives)
    if not any(event.name in HOST_SYNCS for event in events):  # not even those of count_calls
        return Counts(None, None, counted)
    launches = sum(event.name.startswith(LAUNCHES) for event in outside)
    return Counts(launches, sum(event.name in HOST_SYNCS for event in within), counted)


def _inside(event: Any, other: Any) -> bool:
    """Whether an event lasted while another one did."""
    span, whole = event.time_range, other.time_range
    return event is not other and whole.start <= span.start and span.end <= whole.end
