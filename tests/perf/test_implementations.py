"""What is compared can be named, chosen and extended, and does what it stands for."""

import math

import pytest
import torch
from layers import cases, implementations
from layers.correctness import Exercise
from machine.ranks import Place
from measuring import passes

import triton_syncbn

CPU = torch.device("cpu")


def test_a_new_variant_is_one_function(monkeypatch):
    monkeypatch.setattr(implementations, "REGISTERED", {})
    implementations.implementation("gather_syncbn")(triton_syncbn.SyncBN)

    @implementations.implementation("mine", devices=("cpu",))
    def mine(channels):
        return triton_syncbn.SyncBN(channels)

    @implementations.implementation("absent", needs="no_such_package")
    def absent(channels):
        raise AssertionError

    assert list(implementations.implementations(CPU)) == ["gather_syncbn", "mine"]
    assert list(implementations.implementations(CPU, ["mine"])) == ["mine"]
    assert list(implementations.implementations(torch.device("cuda"))) == ["gather_syncbn"]
    with pytest.raises(ValueError, match="on this device, got absent"):
        implementations.implementations(CPU, ["mine", "absent"])


def test_ours_compiled_is_right_and_can_be_run_backwards_twice(one_rank):
    found = implementations.REGISTERED["triton_syncbn_compiled"]
    case = cases.Case("edge", "small", (2, 3, 4), "fp32", "channels_first")
    with implementations.synchronized_even_alone():
        layer = found.make(3)
        assert Exercise(case, Place(0, 1, CPU)).error_of(layer) <= 1.0
        calls = passes.calls_of_passes(layer, torch.randn(2, 3, 4), torch.randn(2, 3, 4))
        output = calls["backward"].prepare()
        first, second = (calls["backward"].work(output) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def gathered_step(rank, world_size):
    """Communication of the layer that stands for torch.nn.SyncBatchNorm."""
    from layers.gather_syncbn import GatherSyncBN

    from tests.support.ranks import counted_communication

    input = torch.randn(3, 5, 4, requires_grad=True)
    with counted_communication() as seen:
        GatherSyncBN(5)(input).sum().backward()
    return [name for name, *_ in seen], [math.prod(shape) for _, shape, _ in seen]


def test_the_stand_in_sends_what_torch_sends(reference_ranks):
    """A gather of 2C + 1 numbers in forward, an all_reduce of 2C in backward."""
    for names, sizes in reference_ranks.run(gathered_step, 2):
        assert names == ["all_gather", "all_reduce"]
        assert sizes == [11, 10]


def test_one_rank_communicates_only_while_compared(one_rank):
    from tests.support.ranks import counted_communication

    layer, input = triton_syncbn.SyncBN(3), torch.randn(4, 3)
    with counted_communication() as seen:
        with implementations.synchronized_even_alone():
            layer(input)
        layer(input)
    assert [name for name, *_ in seen] == ["all_reduce"]
