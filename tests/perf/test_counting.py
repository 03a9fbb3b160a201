"""Launches, waits and collectives are counted, by torch's profiler; nothing of it is assumed."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from layers.implementations import implementations
from measuring.counts import Counts, count_calls, counts_within
from measuring.passes import calls_of_passes
from measuring.times import Call
from torch.autograd import DeviceType

CPU = torch.device("cpu")
EXPECTED = {
    "forward": Counts(2, None, 1),
    "backward": Counts(2, None, 1),
    "both": Counts(4, None, 2),
}


@contextlib.contextmanager
def empty_left_empty():
    """Without what the tests fill empty tensors with, which is an operator, too."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled


def counted_passes(rank, world_size, name):
    """What the passes of an implementation come to, after a first run."""
    layer = implementations(CPU)[name].make(5)
    calls = calls_of_passes(layer, torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4))
    for call in calls.values():
        call.work(call.prepare())
    with empty_left_empty():
        return count_calls(calls, CPU)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ours_is_two_launches_and_one_collective_in_each_pass(reference_ranks, world_size):
    for counted in reference_ranks.run(counted_passes, world_size, "triton_syncbn"):
        assert counted == EXPECTED


def test_the_layer_that_gathers_does_more(reference_ranks):
    """As many collectives, and more around them."""
    for counted in reference_ranks.run(counted_passes, 2, "gather_syncbn"):
        assert [counts.collectives for counts in counted.values()] == [1, 1, 2]
        assert counted["forward"].launches > 10
        assert counted["backward"].launches == 4  # two steps, and a cast each way
        both = counted["forward"].launches + counted["backward"].launches
        assert counted["both"].launches == both


def test_a_layer_that_does_not_synchronize_has_no_collective(reference_ranks):
    for counted in reference_ranks.run(counted_passes, 2, "torch_batchnorm"):
        assert {counts.collectives for counts in counted.values()} == {0}


@pytest.mark.parametrize(
    ("work", "operators"),
    [
        (lambda x: x.view(-1).t().expand(2, 4)[0], 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.contiguous().to(x.dtype).item, 0),
        (lambda x: x + 1, 1),
        (lambda x: x.to(torch.float64), 1),
        (lambda x: torch.cat([x, x]).sum(), 2),
        (lambda x: torch.zeros(3).add_(1).view(3, 1).mul(2), 3),
    ],
    ids=["views", "allocation", "nothing", "one", "cast", "two", "three"],
)
def test_on_a_cpu_operators_that_compute_are_counted(work, operators):
    with empty_left_empty():
        counted = count_calls({"call": Call(work, lambda: torch.randn(4))}, CPU)
    assert counted["call"] == Counts(operators, None, 0)


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
    assert counts_within(events, "pass", operators=False) == Counts(2, 1, 1)


def test_what_the_profiler_does_not_see_is_no_zero():
    events = [event("pass", 10, 90), event("c10d::allreduce_", 30, 40)]
    assert counts_within(events, "pass", operators=False) == Counts(None, None, 1)


@pytest.mark.gpu
def test_a_gpu_counts_launches_and_waits():
    device = torch.device("cuda")
    x = torch.zeros(8, device=device)
    calls = {"two": Call(lambda _: x.add_(1).mul_(2)), "wait": Call(lambda _: x.sum().item())}
    for call in calls.values():
        call.work(None)
    counted = count_calls(calls, device)
    assert counted["two"] == Counts(2, 0, 0)
    assert counted["wait"] == Counts(1, 1, 0)
