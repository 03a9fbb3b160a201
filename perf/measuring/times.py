"""Times of calls that take turns: all are warmed first, and every turn of three or more has an
order of its own, so that clocks and temperature that drift meet all of them alike, and so does what
the call before has left in caches and in the memory of the process. Two take turns one by one.

On a GPU the device's time is that between two events, its L2 cache flushed before, and the host
does not wait for the device until all samples are queued. The host's time is taken in turns of its
own, which begin with an idle device: behind a full queue a launch takes as long as the device does.
On a CPU the two are one.
"""

import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

WARMUP = 3
FLUSH_BYTES = 256 << 20  # larger than the cache of any GPU

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], Any]
Clock = Callable[[], float]


class Samples(NamedTuple):
    """Seconds of each sample of a call, of the device and of the host; of the slowest rank, where
    there are several.
    """

    device: list[float]
    host: list[float]


def time_calls(
    calls: Mapping[Name, Call],
    device: torch.device,
    samples: int,
    *,
    warmup: int = WARMUP,
    clock: Clock = time.perf_counter,
    before: Call | None = None,
    of_host: bool = True,
) -> dict[Name, Samples]:
    """Seconds of `samples` runs of each call; all ranks must time the same calls. On a GPU a sample
    of the device begins with a cache that holds nothing of use, and nothing that has still to be
    written; or with what `before` leaves there. Not `of_host`: seconds of the host are left out,
    and are given as those of the device, if there is one.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    on_device = _device_seconds(calls, device, samples, before) if device.type == "cuda" else {}
    host = on_device
    if of_host or not on_device:
        host = _host_seconds(calls, device, samples, clock)
    return _of_slowest_rank(
        {name: Samples(on_device.get(name, host[name]), host[name]) for name in calls}
    )


def in_cuda_graph(call: Call, device: torch.device) -> Call:
    """A warm call, that replays what `call` does on the device, from a CUDA graph: time it for
    kernels without the host. The current stream must not be the default one.

    Raises RuntimeError where the call cannot be captured, as one that waits for the device cannot.
    """
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result  # it is written to

    return replay


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, in microseconds."""
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80)) * 1e6
    return float(p20), float(p50), float(p80)


def turns(names: list[Name], samples: int) -> Iterator[Name]:
    """Each name once a turn, in an order that is drawn for each, the same in all processes. None
    follows itself; on average each follows each other one as often.
    """
    draw, order = random.Random(0), list(names)
    for _ in range(samples):
        last = order[-1:]
        draw.shuffle(order)
        if order[:1] == last:
            order.reverse()
        yield from order


def _host_seconds(
    calls: Mapping[Name, Call], device: torch.device, samples: int, clock: Clock
) -> dict[Name, list[float]]:
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    several = _several_ranks()
    for name in turns(list(calls), samples):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if several:
            dist.barrier()
        start = clock()
        result = calls[name]()
        seconds[name].append(clock() - start)
        del result  # not within a sample
    return seconds


def _device_seconds(
    calls: Mapping[Name, Call], device: torch.device, samples: int, before: Call | None
) -> dict[Name, list[float]]:
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
    arrived = torch.zeros(1, device=device)
    events: dict[Name, list[tuple[Any, Any]]] = {name: [] for name in calls}
    several = _several_ranks()
    torch.cuda.synchronize(device)
    for name in turns(list(calls), samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()  # reads; what is written stays in the cache until others need its place
        if before is not None:
            before()
        if several:  # devices wait for each other, their hosts do not
            dist.all_reduce(arrived)
        start.record()
        result = calls[name]()
        end.record()
        events[name].append((start, end))
        del result
    torch.cuda.synchronize(device)
    return {
        name: [start.elapsed_time(end) * 1e-3 for start, end in pairs]
        for name, pairs in events.items()
    }


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _of_slowest_rank(mine: dict[Name, Samples]) -> dict[Name, Samples]:
    if not _several_ranks():
        return mine
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    slowest = {name: np.max([rank[name] for rank in every], axis=0) for name in mine}
    return {name: Samples(*seconds.tolist()) for name, seconds in slowest.items()}
