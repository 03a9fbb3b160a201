"""Times of functions on a GPU, whose runs take turns."""

from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

SAMPLES = 30
WARMUP = 3
FLUSH_BYTES = 256 << 20  # larger than the cache of any GPU


def time_on_gpu(functions: Mapping[Name, Callable[[], Any]]) -> dict[Name, float]:
    """Median seconds of each function by device events, the cache flushed before every run.

    A turn runs each function once, and every turn begins with another one, so that clocks and
    temperature that drift meet all of them alike.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    names = list(functions)
    events: dict[Name, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
    for turn in range(WARMUP + SAMPLES):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            functions[name]()
            end.record()
            if turn >= WARMUP:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: median(start.elapsed_time(end) for start, end in pairs) * 1e-3
        for name, pairs in events.items()
    }
