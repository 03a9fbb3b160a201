"""When ranks fall apart: every other rank gets an error that names the layer, at once or where the
timeout of the group ends.
"""

import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import triton_syncbn
from tests.support.ranks import KILLED, PATIENCE, counted_communication
from triton_syncbn import SyncBN

CHANNELS = 3
TIMED_OUT = "Timed out"  # as gloo says it


def make_model(world_size: int) -> torch.nn.Module:
    """Three layers, the last with other channels."""
    model = torch.nn.Sequential()
    model.add_module("first", torch.nn.BatchNorm1d(CHANNELS))
    model.add_module("second", torch.nn.BatchNorm1d(CHANNELS))
    model.add_module("widen", torch.nn.Linear(CHANNELS, 2 * CHANNELS))
    model.add_module("last", torch.nn.BatchNorm1d(2 * CHANNELS))
    return triton_syncbn.convert_sync_batchnorm(model, dist.new_group(list(range(world_size))))


def error_of(work) -> str:
    """The message of the RuntimeError that work raises."""
    with pytest.raises(RuntimeError) as caught:
        work()
    return str(caught.value)


def killed_between_forward_and_backward(rank, world_size):
    model = make_model(world_size)
    output = model(torch.randn(4, CHANNELS, requires_grad=True))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    counts = [layer.num_batches_tracked.item() for layer in (model.first, model.last)]
    return error_of(output.sum().backward), counts


def killed_inside_forward(rank, world_size):
    model = make_model(world_size)

    def die(*_):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model.second.register_forward_pre_hook(die)
    before = model.second.running_mean.clone()
    message = error_of(lambda: model(torch.randn(4, CHANNELS)))
    assert torch.equal(model.second.running_mean, before)  # nothing is half done
    return message, [model[i].num_batches_tracked.item() for i in (0, 1)]


@pytest.mark.parametrize(
    ("scenario", "layer", "pass_name", "counts"),
    [
        (killed_between_forward_and_backward, "last", "backward", [1, 1]),
        (killed_inside_forward, "second", "forward", [1, 0]),
    ],
    ids=["between forward and backward", "inside forward"],
)
def test_a_killed_rank_ends_the_others_with_the_name_of_the_layer(
    scenario, layer, pass_name, counts, mortal_ranks
):
    answers = mortal_ranks.run(scenario, 3)
    assert answers[1] == KILLED
    for message, tracked in (answers[0], answers[2]):
        assert f"SyncBN layer '{layer}': the all_reduce of its {pass_name} failed" in message
        assert TIMED_OUT not in message  # the others are told, and need not wait
        assert tracked == counts


def one_rank_in_eval(rank, world_size):
    """Rank 1 is alive, and does not come before the other one has given up."""
    model = make_model(world_size).train(rank != 1)
    # shortened here, as to make a group takes as long as a busy machine needs for it
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), model.first.process_group)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        model(torch.randn(4, CHANNELS))
        store.wait(["given up"], PATIENCE)
        return None
    message = error_of(lambda: model(torch.randn(4, CHANNELS)))
    store.set("given up", "")
    return message


def test_ranks_that_wait_for_one_in_eval_time_out_with_the_name_of_the_layer(mortal_ranks):
    message, absent = mortal_ranks.run(one_rank_in_eval, 2)
    assert absent is None
    assert "SyncBN layer 'first': the all_reduce of its forward failed" in message
    assert f"{TIMED_OUT} waiting 1000ms" in message


def different_layers(rank, world_size):
    """Two layers of equal channels, used in another order by one rank."""
    model = make_model(world_size)
    order = (model.first, model.second) if rank == 0 else (model.second, model.first)
    return lambda: order[1](order[0](torch.randn(4, CHANNELS)))


def a_layer_in_eval(rank, world_size):
    """One rank has a layer in eval, so its calls slip by one: it is in `second` already."""
    model = make_model(world_size)
    model.first.train(rank == 0)
    return lambda: model(torch.randn(4, CHANNELS))


def two_layers_in_eval(rank, world_size):
    """The calls slip to a layer with other channels."""
    model = make_model(world_size)
    model.first.train(rank == 0)
    model.second.train(rank == 0)
    return lambda: model(torch.randn(4, CHANNELS))


def different_gradients(rank, world_size):
    """Forward agrees; in backward one rank goes through `first` and the other through `second`."""
    model = make_model(world_size)
    inputs = torch.randn(2, 4, CHANNELS, requires_grad=True)
    outputs = model.first(inputs[0]), model.second(inputs[1])
    return outputs[rank].sum().backward


def debug_turned_on_later(rank, world_size):
    """One rank has made a call before its check began, so the others are one call ahead."""
    model = make_model(world_size)
    model.first(torch.randn(4, CHANNELS))
    if rank == 1:
        triton_syncbn.debug()
    return lambda: model.first(torch.randn(4, CHANNELS))


def caught_desynchronized(rank, world_size, scenario):
    with triton_syncbn.debug():
        work = scenario(rank, world_size)
        with counted_communication() as seen:
            message = error_of(work)
    return message, seen


@pytest.mark.parametrize(
    ("scenario", "names", "calls"),
    [
        (different_layers, ("'first': in its forward", "'second': in its forward"), (1, 1)),
        (a_layer_in_eval, ("'first': in its forward", "'second': in its forward"), (1, 1)),
        (two_layers_in_eval, ("'first': in its forward", "'last': in its forward"), (1, 1)),
        (different_gradients, ("'first': in its backward", "'second': in its backward"), (3, 3)),
        (debug_turned_on_later, ("'first': in its forward", "'first': in its forward"), (2, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_debug_finds_ranks_in_different_layers(scenario, names, calls, reference_ranks):
    """Each rank learns its own layer and call, by the one all_reduce that the pass makes anyway."""
    answers = reference_ranks.run(caught_desynchronized, 2, scenario)
    for (message, seen), name, call in zip(answers, names, calls, strict=True):
        assert message.startswith(f"SyncBN layer {name}, call {call} of this rank")
        assert [function for function, *_ in seen] == ["all_reduce"]


def steps_with_and_without_debug(rank, world_size):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = make_model(world_size)
        torch.manual_seed(1 + rank)
        with triton_syncbn.debug(enabled), counted_communication() as seen:
            for _ in range(2):
                input = torch.randn(2 + rank, CHANNELS, requires_grad=True)
                output = model(input)
                output.square().sum().backward()
        results.append((output.detach(), input.grad, dict(model.named_buffers())))
        assert [function for function, *_ in seen] == ["all_reduce"] * 12
    return results


def test_debug_changes_no_result(ranks):
    for off, on in ranks.run(steps_with_and_without_debug, 2):
        assert torch.equal(off[0], on[0])
        assert torch.equal(off[1], on[1])
        assert all(torch.equal(off[2][name], on[2][name]) for name in off[2])


def many_channels(rank, world_size):
    """More sums than what is sent for small layers holds."""
    input = torch.randn(2, 9000, generator=torch.Generator().manual_seed(rank))
    outputs = []
    for enabled in (False, True):
        with triton_syncbn.debug(enabled):
            outputs.append(SyncBN(9000)(input))
    return torch.equal(*outputs)


def test_debug_of_many_channels(reference_ranks):
    assert reference_ranks.run(many_channels, 2) == [True, True]


def test_debug_is_a_switch_and_a_block():
    from triton_syncbn import communication

    triton_syncbn.debug(True)
    assert communication._checking
    with triton_syncbn.debug(False):
        assert not communication._checking
    assert communication._checking
    triton_syncbn.debug(False)
    assert not communication._checking


def test_every_layer_has_a_name_of_its_own():
    names = {SyncBN(4).layer_name for _ in range(3)}
    assert len(names) == 3
    model = torch.nn.ModuleDict({"body": torch.nn.Sequential(SyncBN(4), torch.nn.BatchNorm1d(4))})
    triton_syncbn.convert_sync_batchnorm(model)
    assert [layer.layer_name for layer in model["body"]] == ["body.0", "body.1"]
    bare = triton_syncbn.convert_sync_batchnorm(torch.nn.BatchNorm1d(4))
    assert bare.layer_name == "BatchNorm1d"
