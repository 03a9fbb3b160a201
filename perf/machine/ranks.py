"""The ranks of a command: those of torchrun; else this process alone on its GPU, or without one
several processes over gloo.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

CPU_RANKS = 2

Result = TypeVar("Result")


class Place(NamedTuple):
    """Where a function runs: a rank of the default process group."""

    rank: int
    world_size: int
    device: torch.device


def device_of_rank() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def count_ranks() -> int:
    """How many ranks `run_on_ranks` has."""
    alone = 1 if torch.cuda.is_available() else CPU_RANKS
    return int(os.environ.get("WORLD_SIZE", alone))


def run_on_ranks(work: Callable[..., Result], *arguments: object) -> Result:
    """Call work(place, *arguments) on every rank of a process group that is there for this call.

    Returns what it returned in this process. Function and arguments are pickled.
    """
    world_size = count_ranks()
    if "WORLD_SIZE" in os.environ:
        return _run(int(os.environ["RANK"]), world_size, "env://", work, arguments)
    with tempfile.TemporaryDirectory() as folder:
        same = world_size, f"file://{folder}/store", work, arguments
        others = multiprocessing.spawn(_run_other, same, world_size - 1, join=False)
        result = _run(0, *same)
        while not others.join():
            pass
        return result


def _run_other(index: int, *same: Any) -> None:
    _run(index + 1, *same)


def _run(
    rank: int, world_size: int, store: str, work: Callable[..., Result], arguments: tuple
) -> Result:
    place = Place(rank, world_size, device_of_rank())
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    with left_alone_by_the_scheduler(place), process_group(place, store):
        return work(place, *arguments)


@contextlib.contextmanager
def left_alone_by_the_scheduler(place: Place) -> Iterator[None]:
    """Threads that this one starts stay on this rank's share of the cores, if there are enough, and
    interrupt no other, where the system can be told so. Not on a GPU.

    A rank that is sent a part of a sum must not interrupt the sender, who has more to send: an
    all_reduce of 8 ranks on two cores takes a quarter of the time. And of two ranks half, whose
    threads otherwise wake up on either core.
    """
    if place.device.type == "cuda" or not hasattr(os, "SCHED_BATCH"):
        yield
        return
    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    own = sorted(before[0])[place.rank :: place.world_size]
    if len(before[0]) >= place.world_size:
        os.sched_setaffinity(0, own)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before[1], os.sched_param(0))
        os.sched_setaffinity(0, before[0])


@contextlib.contextmanager
def process_group(place: Place, store: str) -> Iterator[None]:
    """The default process group, over NCCL or gloo; `store` is where its ranks meet, a URL."""
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=store, rank=place.rank, world_size=place.world_size
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
