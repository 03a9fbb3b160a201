"""Real processes for the tests of the layer: a pool of ranks that talk over gloo on this machine.

Starting Python and importing torch takes seconds, so a server does it once and forks the processes;
these stay, and each call makes a fresh default process group of the size it asks for.
"""

import contextlib
import os
import pathlib
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.support import interpreter

# For what comes, on a machine that has other things to do. It ends before a test does, so that what
# never comes is an error of the rank that waits for it.
PATIENCE = timedelta(minutes=10)
KILLED = "killed"  # what a rank returned whose process ended


class Failure(Exception):
    """What a rank raised, with its traceback."""


def fill_empty_tensors() -> None:
    """Make torch fill what torch.empty and its like return: NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def _preloaded() -> list[str]:
    """What the server imports. Deterministic algorithms import torch's inductor, and that Triton,
    which is interpreted or compiled as it was imported: without a GPU nothing is compiled.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return ["torch._inductor.config" if interpreted else "torch", "tests.support.ranks"]


def _serve(connection: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    fill_empty_tensors()
    if environment.get("TRITON_INTERPRET") == "1":
        interpreter.prepare()
    while (call := connection.recv()) is not None:
        function, rank, world_size, store, arguments = pickle.loads(call)
        try:
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world_size,
                    timeout=PATIENCE,
                )
                dist.barrier()  # nobody leaves before all are connected
                answer = pickle.dumps(function(rank, world_size, *arguments)), None
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException:
            answer = None, traceback.format_exc()
        connection.send(answer)


class Ranks:
    """A pool of processes; `run` calls a function on as many of them as asked for."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.processes: list[Any] = []
        self.connections: list[Any] = []

    def _grow(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preloaded())
        while len(self.processes) < size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self.environment), daemon=True)
            process.start()
            self.processes.append(process)
            self.connections.append(here)

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Call function(rank, world_size, *arguments) on ranks of one process group.

        Returns what each rank returned, in the order of the ranks. Raises Failure if any raised.
        """
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            store = str(pathlib.Path(folder) / "store")
            for rank in range(world_size):
                call = pickle.dumps((function, rank, world_size, store, arguments))
                self.connections[rank].send(call)
            answers = [self._receive(rank) for rank in range(world_size)]
        self._bury()
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if failures:
            self.stop()  # what failed may be in any state: the next run starts others
            raise Failure("\n".join(failures))
        return [pickle.loads(answer) for answer, _ in answers]

    def _receive(self, rank: int) -> tuple[bytes | None, str | None]:
        try:
            return self.connections[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return pickle.dumps(KILLED), None

    def _bury(self) -> None:
        """Forget processes that ended, so that the next run starts others."""
        for index in reversed(range(len(self.processes))):
            if self.processes[index].exitcode is not None:
                del self.processes[index], self.connections[index]

    def stop(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(10)
        self.processes, self.connections = [], []


@contextlib.contextmanager
def pool(**environment: str) -> Iterator[Ranks]:
    """A pool whose processes have these environment variables."""
    ranks = Ranks(environment)
    try:
        yield ranks
    finally:
        ranks.stop()


@contextlib.contextmanager
def counted_communication() -> Iterator[list[tuple[str, tuple[int, ...], torch.dtype]]]:
    """Record the calls of torch.distributed that communicate: name, shape and dtype.

    The functions are replaced in torch.distributed and in the module that defines them, so a call
    is seen however it is reached, short of the C++ methods of a process group.
    """
    names = [
        *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
        *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier"),
        *("batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "gather_object"),
        *("irecv", "isend", "monitored_barrier", "recv", "reduce", "reduce_scatter"),
        *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
    ]
    seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    originals = {name: getattr(dist, name) for name in names}

    def recorder(name: str) -> Callable[..., Any]:
        def record(*arguments: Any, **keywords: Any) -> Any:
            tensor = next((a for a in arguments if isinstance(a, torch.Tensor)), torch.empty(0))
            seen.append((name, tuple(tensor.shape), tensor.dtype))
            return originals[name](*arguments, **keywords)

        return record

    for name in names:
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, recorder(name))
    try:
        yield seen
    finally:
        for name in names:
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, originals[name])
