"""Launches, waits and collectives are counted, by torch's profiler; nothing of it is assumed."""

from types import SimpleNamespace

import pytest
import torch
from layers.exercise import calls_of_passes
from layers.implementations import implementations
from measuring.counts import Counts, count_calls, counts_within
from torch.autograd import DeviceType

CPU = torch.device("cpu")


def counted_passes(rank, world_size, name):
    """What the passes of an implementation come to, after a first run."""
    layer = implementations(CPU)[name].layer_class(5)
    calls = calls_of_passes(layer, torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4))
    for call in calls.values():
        call()
    return count_calls(calls, CPU)


@pytest.mark.parametrize(
    ("name", "collectives"),
    [("torch_batchnorm", 0), ("handwritten_syncbn", 1), ("gather_syncbn", 1), ("triton_syncbn", 1)],
)
def test_collectives_are_counted_on_a_cpu_and_launches_are_not(name, collectives, reference_ranks):
    one, two = Counts(None, None, collectives), Counts(None, None, 2 * collectives)
    for counted in reference_ranks.run(counted_passes, 2, name):
        assert counted == {"forward": one, "backward": one, "both": two}


def event(name, start, end, device_type=DeviceType.CPU):
    """An event as the profiler reports one."""
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=device_type)


def test_on_a_gpu_runtime_calls_within_the_pass_are_counted():
    """Also those of other threads; not those of NCCL, of kernels, or from before and after."""
    events = [
        event("cudaLaunchKernel", 1, 2),
        event("pass", 10, 90),
        event("cuLaunchKernelEx", 11, 12),
        event("cudaLaunchKernelExC", 13, 14),
        event("moments_kernel", 20, 25, device_type=DeviceType.CUDA),
        event("c10d::allreduce_", 30, 40),
        event("cuLaunchKernelEx", 31, 32),
        event("c10d::other", 34, 35),
        event("cudaMemcpyAsync", 50, 51),
        event("cudaStreamSynchronize", 51, 52),
        event("cudaDeviceSynchronize", 95, 99),
    ]
    assert counts_within(events, "pass") == Counts(2, 1, 1)


def test_what_the_profiler_does_not_see_is_no_zero():
    events = [event("pass", 10, 90), event("c10d::allreduce_", 30, 40)]
    assert counts_within(events, "pass") == Counts(None, None, 1)


@pytest.mark.gpu
def test_a_gpu_counts_launches_and_waits():
    device = torch.device("cuda")
    x = torch.zeros(8, device=device)
    calls = {"two": lambda: x.add_(1).mul_(2), "wait": lambda: x.sum().item()}
    for call in calls.values():
        call()
    counted = count_calls(calls, device)
    assert counted["two"] == Counts(2, 0, 0)
    assert counted["wait"] == Counts(1, 1, 0)
