"""The timer takes what it says: of every call, in turns, without what is prepared. Ranks do not
meet on a core meanwhile.
"""

import collections
import itertools
import os

import pytest
import torch
from machine.ranks import Place, left_alone_by_the_scheduler
from measuring import times
from measuring.times import in_cuda_graph, percentiles, time_calls, turns

CPU = torch.device("cpu")


class FakeClock:
    """A clock that goes on only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def spending(clock, durations):
    """A call whose samples take these seconds, one after the other."""
    remaining = itertools.cycle(durations)
    return lambda: clock.spend(next(remaining))


def test_percentiles_are_those_of_the_samples():
    clock = FakeClock()
    calls = {
        "steady": spending(clock, [3e-6]),
        "slow": spending(clock, [n * 1e-6 for n in (50, 10, 40, 20, 30, 60)]),
    }
    measured = time_calls(calls, CPU, 6, warmup=0, clock=clock)
    assert percentiles(measured["steady"].device) == pytest.approx((3, 3, 3))
    assert percentiles(measured["slow"].device) == pytest.approx((20, 35, 50))
    assert measured["slow"].host == measured["slow"].device


def test_warming_is_not_timed():
    clock = FakeClock()
    durations = iter([9.0, 8.0, 7.0, 0.1, 0.2])
    measured = time_calls({"call": spending(clock, durations)}, CPU, 2, warmup=3, clock=clock)
    assert measured["call"].device == pytest.approx([0.1, 0.2])


def test_a_call_follows_each_other_one_as_often():
    """What a call leaves in caches and memory is the next one's advantage or loss."""
    names = list("abcd")
    order = list(turns(names, 600))
    assert order == list(turns(names, 600))  # as all ranks must time the same
    assert all(sorted(order[n : n + 4]) == names for n in range(0, len(order), 4))
    pairs = collections.Counter(itertools.pairwise(order))
    assert set(pairs) == set(itertools.permutations(names, 2))
    assert all(160 <= number <= 240 for number in pairs.values())  # 200 on average


@pytest.mark.parametrize(("names", "order"), [("", ""), ("a", "aaa"), ("ab", "ababab")])
def test_few_calls_take_turns(names, order):
    assert sorted(turns(list(names), 3)) == sorted(order)
    assert all(a != b for a, b in itertools.pairwise(turns(list(names), 3))) or len(names) < 2


def sleepy_rank(rank, world_size):
    """The samples of a call that takes as long as this rank says."""
    clock = FakeClock()
    durations = [[1.0, 5.0], [2.0, 3.0]][rank]
    return time_calls({"call": spending(clock, durations)}, CPU, 2, warmup=0, clock=clock)["call"]


def test_a_sample_is_as_slow_as_its_slowest_rank(reference_ranks):
    for measured in reference_ranks.run(sleepy_rank, 2):
        assert measured.device == [2.0, 5.0]


class FakeGPU:
    """Stands for torch.cuda: writes down what the timer asks of it."""

    def __init__(self):
        self.log = []

    def synchronize(self, device):
        self.log.append("synchronize")

    def Event(self, enable_timing):
        log = self.log

        class Event:
            def record(self):
                log.append("event")

            def elapsed_time(self, end):
                return 1.5

        return Event()


def test_the_host_does_not_wait_between_samples_of_a_gpu(monkeypatch):
    gpu = FakeGPU()
    flush = type("Flush", (), {"sum": lambda self: gpu.log.append("flush")})()
    monkeypatch.setattr(times.torch, "cuda", gpu)
    monkeypatch.setattr(times.torch, "zeros", lambda *sizes, **options: flush)
    calls = {"call": lambda: gpu.log.append("work")}
    before = lambda: gpu.log.append("before")  # noqa: E731
    seconds = times._device_seconds(calls, torch.device("cuda"), 2, before)
    sample = ["flush", "before", "event", "work", "event"]
    assert gpu.log == ["synchronize", *sample, *sample, "synchronize"]
    assert seconds == {"call": [1.5e-3, 1.5e-3]}


@pytest.mark.gpu
def test_device_time_and_graph_on_a_gpu():
    device = torch.device("cuda")
    small, large = (torch.zeros(size, device=device) for size in (1 << 10, 1 << 27))
    calls = {
        "small": lambda: small.add_(1),
        "large": lambda: large.add_(1),
    }
    calls["small"]()
    with torch.cuda.stream(torch.cuda.Stream()):
        calls["graph"] = in_cuda_graph(calls["small"], device)
    measured = time_calls(calls, device, 20)
    medians = {name: percentiles(samples.device)[1] for name, samples in measured.items()}
    assert 0 < medians["small"] < medians["large"]
    assert 0 < medians["graph"] < medians["large"]
    before = small[0].item()
    calls["graph"]()
    assert small[0].item() == before + 1


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="of Linux")
@pytest.mark.parametrize("world_size", [1, 2, 1 << 20])
def test_ranks_have_their_share_of_the_cores_and_give_it_back(world_size):
    cores, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    shares = []
    for rank in range(min(world_size, 2)):
        with left_alone_by_the_scheduler(Place(rank, world_size, torch.device("cpu"))):
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
            shares.append(os.sched_getaffinity(0))
        assert (os.sched_getaffinity(0), os.sched_getscheduler(0)) == (cores, policy)
    if len(cores) >= world_size:
        assert sorted(itertools.chain(*shares)) == sorted(cores)
    else:
        assert shares == [cores] * len(shares)
