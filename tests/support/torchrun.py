"""Programs that torchrun starts, as users start them: without a GPU and without the interpreter."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of C++, where a thread is left as a process ends. torch has threads, and leaves one now and then;
# this library has none.
THREAD_WAS_LEFT = "terminate called without an active exception"
MOST_STARTS = 5


def start(program: pathlib.Path, *arguments: str, agent: tuple[str, ...]) -> subprocess.Popen[str]:
    """An agent of torchrun with two processes, which have warnings of the program as errors."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *(*agent, str(program), *arguments),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error:::__main__",
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "0",
            "OMP_NUM_THREADS": "1",
        },
        cwd=program.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(*agents: subprocess.Popen[str]) -> str:
    """What all processes of the agents print."""
    outputs = []
    for agent in agents:
        output, errors = agent.communicate()
        assert agent.returncode == 0, errors
        outputs.append(output)
    return "".join(outputs)


def printed_on_two_ranks(program: pathlib.Path, *arguments: str) -> str:
    """What both print; started again if torch left a thread, as one time in eight where it shards
    a model on a busy machine.
    """
    for _ in range(MOST_STARTS - 1):
        try:
            return printed(start(program, *arguments, agent=("--standalone",)))
        except AssertionError as error:
            if THREAD_WAS_LEFT not in str(error):
                raise
    return printed(start(program, *arguments, agent=("--standalone",)))


def printed_on_two_nodes(program: pathlib.Path, *arguments: str) -> str:
    """Two ranks on each of two nodes, which meet at an address as nodes of a cluster do."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test")
    return printed(
        *(
            start(program, *arguments, agent=("--nnodes=2", f"--node-rank={node}", *rendezvous))
            for node in range(2)
        )
    )
