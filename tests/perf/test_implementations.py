"""What is compared can be named, chosen and extended, and does what it stands for."""

import math

import pytest
import torch
from layers import cases, implementations
from layers.exercise import Exercise
from layers.gather_syncbn import GatherSyncBN
from layers.handwritten_syncbn import HandwrittenSyncBN
from machine.ranks import Place

import triton_syncbn
from tests.support.ranks import counted_communication

CPU = torch.device("cpu")


def test_ours_compiled_is_right_and_can_be_run_backwards_twice(one_rank):
    found = implementations.IMPLEMENTATIONS["triton_syncbn_compiled"]
    case = cases.Case("edge", "small", (2, 3, 4), "fp32", "channels_first")
    with implementations.synchronized_even_alone():
        error, calls = Exercise(case, Place(0, 1, CPU)).enter(found)
        first, second = (calls["backward"]() for _ in range(2))
    assert error <= 1.0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def counted_step(rank, world_size, layer_class):
    """What a layer communicates."""
    input = torch.randn(3, 5, 4, requires_grad=True)
    with counted_communication() as seen:
        layer_class(5)(input).sum().backward()
    return [name for name, *_ in seen], [math.prod(shape) for _, shape, _ in seen]


@pytest.mark.parametrize(
    ("layer_class", "expected"),
    [
        # a gather of 2C + 1 numbers in forward, an all_reduce of 2C in backward, as torch's has
        (GatherSyncBN, (["all_gather", "all_reduce"], [11, 10])),
        (HandwrittenSyncBN, (["all_reduce", "all_reduce"], [10, 10])),
    ],
)
def test_others_send_what_they_stand_for(layer_class, expected, reference_ranks):
    assert reference_ranks.run(counted_step, 2, layer_class) == [expected] * 2


def test_one_rank_communicates_only_while_compared(one_rank):
    layer, input = triton_syncbn.SyncBN(3), torch.randn(4, 3)
    with counted_communication() as seen:
        with implementations.synchronized_even_alone():
            layer(input)
        layer(input)
    assert [name for name, *_ in seen] == ["all_reduce"]
