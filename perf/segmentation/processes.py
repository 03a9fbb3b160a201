"""The processes that train: those of torchrun, else some that are started here and talk over gloo,
or NCCL with `device_type` "cuda".
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from machine.ranks import Place, left_alone_by_the_scheduler, process_group

CPU_RANKS = 8


def count_processes(device_type: str) -> int:
    """How many there are, or will be."""
    here = CPU_RANKS if device_type == "cpu" else torch.cuda.device_count()
    return int(os.environ.get("WORLD_SIZE", here))


def run_on_processes(device_type: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call work(place, *arguments) in each; returns what it returned in this one."""
    world_size = count_processes(device_type)
    if "WORLD_SIZE" in os.environ:
        rank = int(os.environ["RANK"])
        return _run(rank, world_size, device_type, "env://", work, arguments)
    context = multiprocessing.get_context("forkserver")  # which imports torch once for all
    with tempfile.TemporaryDirectory() as folder:
        same = world_size, device_type, f"file://{folder}/store", work, arguments
        others = [
            context.Process(target=_run, args=(rank, *same), daemon=True)
            for rank in range(1, world_size)
        ]
        for process in others:
            process.start()
        result = _run(0, *same)
        for process in others:
            process.join()
        return result


def _run(
    rank: int,
    world_size: int,
    device_type: str,
    store: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    device = torch.device("cpu")
    torch.set_num_threads(1)  # the network is too small to share
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
        # One result on any number of ranks: no choice of algorithm by timing, no rounding to TF32.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    place = Place(rank, world_size, device)
    with left_alone_by_the_scheduler(place), process_group(place, store):
        return work(place, *arguments)
