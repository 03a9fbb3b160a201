"""Groups of ranks: what `process_group` may be, groups of k ranks and of a node, and what is left
of a layer whose group is gone.
"""

import copy
import functools
import os
import pickle
import socket
import tempfile
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.support.ranks import counted_communication
from triton_syncbn import (
    SyncBN,
    checkpoint_contexts,
    convert_sync_batchnorm,
    debug,
    sync_group,
)


def mean_seen_by(group, rank):
    """What a layer takes for the mean where rank r has values around 10 * r."""
    layer = SyncBN(2, momentum=1.0, process_group=group)
    layer(torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10.0 * rank)
    return layer.running_mean.tolist()


def groups_of_a_size(rank, world_size, size):
    group = sync_group(size)
    assert sync_group(size=size) is group
    mean = mean_seen_by(group, rank)
    dist.barrier()
    return dist.get_process_group_ranks(group), mean


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [([0], 0), ([1], 10), ([2], 20), ([3], 30)]),
        (2, [([0, 1], 5), ([0, 1], 5), ([2, 3], 25), ([2, 3], 25)]),
        (4, [([0, 1, 2, 3], 15)] * 4),
    ],
)
def test_groups_of_consecutive_ranks(size, expected, reference_ranks):
    answers = reference_ranks.run(groups_of_a_size, 4, size)
    assert answers == [(ranks, [1.0 + mean, 2.0 + mean]) for ranks, mean in expected]


def groups_of_nodes(rank, world_size, agents, hosts):
    """As torchrun tells each rank the agent that started it, on a host of this name."""
    with (
        mock.patch.dict(os.environ, GROUP_RANK=agents[rank]),
        mock.patch.object(socket, "gethostname", lambda: hosts[rank]),
    ):
        ranks = dist.get_process_group_ranks(sync_group("node"))
    dist.barrier()  # who leaves at once breaks the connections that others are still making
    return ranks


@pytest.mark.parametrize(
    ("agents", "hosts", "expected"),
    [
        ("0000", "aaaa", [[0, 1, 2, 3]] * 4),
        ("0011", "aaaa", [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ("0100", "aaaa", [[0, 2, 3], [1], [0, 2, 3], [0, 2, 3]]),
        ("0000", "abab", [[0, 2], [1, 3], [0, 2], [1, 3]]),
    ],
)
def test_groups_of_a_node(agents, hosts, expected, reference_ranks):
    """Nodes may differ in their number of ranks, and ranks may come in any order."""
    assert reference_ranks.run(groups_of_nodes, 4, agents, hosts) == expected


def pair_of(rank):
    """The group of ranks 0 and 2, or of 1 and 3."""
    return [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]


def cubes(layer, input, *residual):
    return layer(input, *residual).pow(3).sum()


def plain_gradient(layer, input, *residual):
    return torch.autograd.grad(cubes(layer, input, *residual), input)[0]


def second_derivative(layer, input):
    (gradient,) = torch.autograd.grad(cubes(layer, input), input, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), input)[0]


def checked_gradient(layer, input):
    with debug():
        return plain_gradient(layer, input)


def compiled_gradient(layer, input):
    torch._dynamo.reset()
    return plain_gradient(torch.compile(layer, fullgraph=True, backend="aot_eager"), input)


def checkpointed_gradient(layer, input, context_fn=checkpoint_contexts):
    run = functools.partial(checkpoint, layer, use_reentrant=False, context_fn=context_fn)
    return plain_gradient(run, input)


def gradient_with_saved_sums(layer, input):
    sums = [torch.ops.triton_syncbn.all_reduce.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, sums)
    return checkpointed_gradient(layer, input, contexts)


# Whatever way leads to an all_reduce: an activation, and a function of the layer and the input.
WAYS = {
    "a layer": (None, plain_gradient),
    "an activation": ("silu", plain_gradient),
    "a residual": ("relu", lambda layer, input: plain_gradient(layer, input, input.detach())),
    "a second derivative": (None, second_derivative),
    "torch.func": (
        None,
        lambda layer, input: torch.func.grad(functools.partial(cubes, layer))(input),
    ),
    "debug": (None, checked_gradient),
    "a compiled layer": (None, compiled_gradient),
    "a checkpoint": (None, checkpointed_gradient),
    "a checkpoint with saved sums": (None, gradient_with_saved_sums),
}


def gradients_in_pairs(rank, world_size, inputs):
    group = pair_of(rank)
    return {
        name: way(
            SyncBN(
                3,
                activation=activation,
                track_running_stats=False,
                process_group=group,
                dtype=torch.float64,
            ),
            inputs[rank].clone().requires_grad_(),
        )
        for name, (activation, way) in WAYS.items()
    }


@pytest.mark.filterwarnings("ignore")  # of selective checkpoints and of the compiler
def test_gradients_are_those_of_the_group(reference_ranks):
    """In backward, too, ranks 0 and 2 are one batch and 1 and 3 another, on every way to it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    seen = reference_ranks.run(gradients_in_pairs, 4, inputs)
    for name, (activation, way) in WAYS.items():
        for pair in (0, 1):
            whole = inputs[pair::2].flatten(0, 1).requires_grad_()
            layer = SyncBN(3, activation=activation, track_running_stats=False, dtype=torch.float64)
            ours = torch.cat([seen[pair][name], seen[pair + 2][name]])
            torch.testing.assert_close(ours, way(layer, whole), msg=lambda text, n=name: n + text)


def statistics_as_the_group_changes(rank, world_size):
    """A layer is given one group after the other, and a backward comes after its group has gone."""
    pair = pair_of(rank)
    input = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10.0 * rank
    leaf = input.clone().requires_grad_()
    layer = SyncBN(2, momentum=1.0, process_group=pair)
    output = layer(leaf)
    means = []
    for group in (pair, sync_group(2), None, sync_group(1)):
        layer.process_group = group
        layer(input)
        means.append(layer.running_mean[0].item())
    convert_sync_batchnorm(layer, process_group=pair)
    layer(input)
    gradient = torch.autograd.grad(output.pow(3).sum(), leaf)[0]
    dist.barrier()
    return [*means, layer.running_mean[0].item()], gradient


def test_a_layer_may_change_its_group(reference_ranks):
    """A forward takes the group that the layer has; a backward, that of its forward."""
    seen = reference_ranks.run(statistics_as_the_group_changes, 4)
    assert [means for means, _ in seen] == [
        [1.0 + mean for mean in means]
        for means in (
            [10.0, 5.0, 15.0, 0.0, 10.0],
            [20.0, 5.0, 15.0, 10.0, 20.0],
            [10.0, 25.0, 15.0, 20.0, 10.0],
            [20.0, 25.0, 15.0, 30.0, 20.0],
        )
    ]
    whole = torch.tensor([[0.0, 1.0], [2.0, 3.0], [20.0, 21.0], [22.0, 23.0]]).requires_grad_()
    expected = plain_gradient(SyncBN(2), whole)
    torch.testing.assert_close(torch.cat([seen[0][1], seen[2][1]]), expected)


def made_again_after_a_restart(rank, world_size, folder):
    """A group that was destroyed is not handed out again."""
    group = sync_group(1)
    dist.destroy_process_group(group)
    again = sync_group(1)
    assert again is not group
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    assert sync_group(1) is not again
    assert mean_seen_by(sync_group(1), rank) == [1.0 + 10 * rank, 2.0 + 10 * rank]
    dist.barrier()


def test_groups_end_with_torch_distributed(tmp_path, reference_ranks):
    reference_ranks.run(made_again_after_a_restart, 2, str(tmp_path))


def bad_sizes(rank, world_size):
    with counted_communication() as seen:
        for size, error, message in (
            (2, ValueError, "size: expected a divisor of 3, the world size, got 2"),
            (0, ValueError, "size: expected a divisor of 3, the world size, got 0"),
            (-1, ValueError, "size: .*got -1"),
            (True, TypeError, 'size: expected an int or "node", got True'),
            ("host", TypeError, "size: .*got 'host'"),
            (1.0, TypeError, "size: .*got 1.0"),
        ):
            with pytest.raises(error, match=message):
                sync_group(size)
    assert seen == []


def test_a_bad_size_is_an_error(reference_ranks):
    reference_ranks.run(bad_sizes, 3)


def test_a_group_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        sync_group(2)


def synchronized_over_meshes(rank, world_size):
    """Ranks 0 and 2, 1 and 3 of a square, by either way to hand over a mesh."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    model = convert_sync_batchnorm(
        torch.nn.Sequential(torch.nn.BatchNorm1d(2)), process_group=square["replica"]
    )
    assert f"process_group=ranks [{rank % 2}, {rank % 2 + 2}]" in repr(model)
    assert copy.deepcopy(model)[0].process_group is model[0].process_group
    assert pickle.loads(pickle.dumps(model[0])).process_group is None
    with pytest.raises(
        ValueError, match=r"process_group: expected a 1-D DeviceMesh, got .*\(2, 2\)"
    ):
        SyncBN(2, process_group=square)(torch.randn(4, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + 10.0 * rank
    torch.testing.assert_close(compiled(input), model(input))
    assert model[0].num_batches_tracked == 2
    mean = mean_seen_by(square["replica"], rank)
    dist.barrier()
    return mean


def test_a_mesh_is_a_group(reference_ranks):
    means = reference_ranks.run(synchronized_over_meshes, 4)
    assert means == [[11.0, 12.0], [21.0, 22.0]] * 2


def outside_of_a_group(rank, world_size):
    """Rank 1 is in neither group: it evaluates, prints and copies, and must not train."""
    mesh = dist.DeviceMesh("cpu", [0])
    for group in (dist.new_group([0]), mesh):
        layer = SyncBN(2, process_group=group)
        layer.eval()(torch.randn(4, 2))
        copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
        for other in copies:
            other.eval()(torch.randn(4, 2))
        if rank == 0:
            assert "process_group=ranks [0]" in repr(layer)
            layer.train()(torch.randn(4, 2))
            continue
        assert "process_group=one without it" in repr(layer)
        with (
            counted_communication() as seen,
            pytest.raises(
                ValueError, match=r"process_group: expected .* that this rank belongs to"
            ),
        ):
            layer.train()(torch.randn(4, 2))
        assert seen == []


def test_a_rank_outside_of_the_group_evaluates(reference_ranks):
    reference_ranks.run(outside_of_a_group, 2)


def group_and_mesh_of_this_process():
    """Both outlive torch.distributed."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=0, world_size=1)
        groups = dist.new_group([0]), dist.DeviceMesh("cpu", [0]), dist.group.WORLD
        dist.destroy_process_group()
    return groups


def test_a_layer_outlives_its_group():
    for group in group_and_mesh_of_this_process():
        layer = SyncBN(2, process_group=group)
        layer.eval()(torch.randn(4, 2))
        assert repr(layer).endswith("process_group=one that was destroyed)")
        assert copy.deepcopy(layer).process_group is group
        assert pickle.loads(pickle.dumps(layer)).process_group is None
        with pytest.raises(ValueError, match=r"process_group: expected .* one that was destroyed"):
            layer.train()(torch.randn(4, 2))
        layer.process_group = None
        layer.train()(torch.randn(4, 2))
        assert layer.num_batches_tracked == 1


def test_anything_else_is_an_error(one_rank):
    for group in ("gloo", 2, [0, 1]):
        with pytest.raises(TypeError, match=r"process_group: expected .*DeviceMesh or None, got "):
            SyncBN(2, process_group=group)(torch.randn(4, 2))
