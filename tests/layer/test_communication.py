"""What goes over the wire: one all_reduce a pass, of a size that the channels alone decide, or
nothing.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

import triton_syncbn
from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, communication, debug

CHANNELS = 3
FORWARD = ("all_reduce", (2 * CHANNELS + 1,), torch.float64)
BACKWARD = ("all_reduce", (2 * CHANNELS,), torch.float64)


def communication_of_a_step(rank, world_size, inputs):
    """What rank's forward and backward on inputs[rank] send."""
    input = inputs[rank].requires_grad_()
    layer = SyncBN(CHANNELS)
    with counted_communication() as forward:
        output = layer(input)
    with counted_communication() as backward:
        output.sum().backward()
    return forward, backward


INPUTS = {
    "float32": [torch.randn(4, CHANNELS, 5, 5), torch.randn(2, CHANNELS, 5, 5)],
    "bfloat16": [torch.randn(4, CHANNELS, 9).bfloat16(), torch.randn(1, CHANNELS, 9).bfloat16()],
    "mixed dtypes": [torch.randn(2, CHANNELS).double(), torch.randn(3, CHANNELS).half()],
    "mixed layouts": [
        torch.randn(2, CHANNELS, 4, 4),
        torch.randn(2, CHANNELS, 4, 4).to(memory_format=torch.channels_last),
    ],
    "an empty rank": [torch.randn(2, CHANNELS, 3, 3), torch.randn(0, CHANNELS, 3, 3)],
    "mixed ranks of input": [torch.randn(2, CHANNELS, 3), torch.randn(2, CHANNELS, 3, 3, 3)],
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_one_all_reduce_a_pass(inputs, ranks):
    for forward, backward in ranks.run(communication_of_a_step, 2, inputs):
        assert forward == [FORWARD]
        assert backward == [BACKWARD]


def communication_in_eval(rank, world_size):
    layer = SyncBN(CHANNELS).eval()
    untracked = SyncBN(CHANNELS, track_running_stats=False).eval()
    input = torch.randn(2, CHANNELS, 3, requires_grad=True)
    with counted_communication() as seen:
        if rank == 0:  # nobody waits for the others
            (layer(input) + untracked(input)).sum().backward()
    return seen


def test_nothing_is_communicated_in_eval(ranks):
    assert ranks.run(communication_in_eval, 2) == [[], []]


def test_nothing_is_communicated_by_one_rank(ranks):
    input = [torch.randn(4, CHANNELS, 2)]
    assert ranks.run(communication_of_a_step, 1, input) == [([], [])]


def gradient_of_the_weight_alone(rank, world_size):
    layer = SyncBN(CHANNELS)
    output = layer(torch.randn(2, CHANNELS, 3))
    with counted_communication() as seen:
        output.square().sum().backward()
    assert layer.weight.grad is not None
    return seen


def test_no_gradient_of_the_input_no_communication_for_it(ranks):
    assert ranks.run(gradient_of_the_weight_alone, 2) == [[], []]


def distributed(tensor):
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())), _init_backend=False)
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


BAD_CALLS = {
    "1-D": (lambda: {"input": torch.randn(CHANNELS)}, ValueError, r"input: .*\(N, C, \*spatial\)"),
    "channels": (
        lambda: {"input": torch.randn(2, CHANNELS + 1, 3)},
        ValueError,
        rf"expected shape \({CHANNELS + 1},\).*got \({CHANNELS},\)",
    ),
    "integers": (
        lambda: {"input": torch.ones(2, CHANNELS, dtype=torch.int64)},
        TypeError,
        r"input: expected float16.*torch\.int64",
    ),
    "not a tensor": (lambda: {"input": [[1.0] * CHANNELS]}, TypeError, "input: .*got list"),
    "sparse": (
        lambda: {"input": torch.randn(2, CHANNELS, 3).to_sparse()},
        TypeError,
        "input: expected a dense torch.Tensor, got a sparse_coo one",
    ),
    "nested": (
        lambda: {"input": torch.nested.nested_tensor([torch.randn(CHANNELS, 3)] * 2)},
        TypeError,
        "input: expected a dense torch.Tensor, got a nested one",
    ),
    "jagged": (
        lambda: {
            "input": torch.nested.nested_tensor(
                [torch.randn(2, CHANNELS), torch.randn(1, CHANNELS)], layout=torch.jagged
            )
        },
        TypeError,
        "input: expected a dense torch.Tensor, got a nested one",
    ),
    "mkldnn": (
        lambda: {"input": torch.randn(2, CHANNELS, 3).to_mkldnn()},
        TypeError,
        "input: expected a dense torch.Tensor, got a mkldnn one",
    ),
    "distributed": (
        lambda: {"input": distributed(torch.randn(2, CHANNELS, 3))},
        TypeError,
        "input: expected this rank's torch.Tensor, got a DTensor",
    ),
    "distributed weight": (
        lambda: {"weight": distributed(torch.ones(CHANNELS))},
        TypeError,
        "weight: expected this rank's torch.Tensor or None, got a DTensor",
    ),
    "weight elsewhere": (
        lambda: {"weight": torch.ones(CHANNELS, device="meta")},
        ValueError,
        "weight: expected device cpu.*got meta",
    ),
    "weight's shape": (
        lambda: {"weight": torch.ones(CHANNELS + 2)},
        ValueError,
        r"weight: expected shape \(3,\).*got \(5,\)",
    ),
    "integer bias": (
        lambda: {"bias": torch.ones(CHANNELS, dtype=torch.int32)},
        TypeError,
        r"bias: expected float16.*torch\.int32",
    ),
    "one buffer": (lambda: {"running_var": None}, ValueError, "running_var: expected a tensor"),
    "no counter": (lambda: {"momentum": None}, ValueError, "num_batches_tracked: .*momentum"),
    "boolean counter": (
        lambda: {"num_batches_tracked": torch.tensor(False)},
        TypeError,
        r"num_batches_tracked: expected a tensor of numbers.*torch\.bool",
    ),
    "counter elsewhere": (
        lambda: {"num_batches_tracked": torch.tensor(0, device="meta")},
        ValueError,
        "num_batches_tracked: expected one number on cpu.*on meta",
    ),
    "strided buffer": (
        lambda: {"running_mean": torch.zeros(CHANNELS, 2)[:, 0]},
        ValueError,
        r"running_mean: expected contiguous memory, got stride \(2,\)",
    ),
    "no channels": (
        lambda: {"input": torch.randn(2, 0, 3)},
        ValueError,
        "input: expected at least one channel",
    ),
    "negative eps": (lambda: {"eps": -1.0}, ValueError, r"eps: .*got -1\.0"),
    "not a group": (
        lambda: {"process_group": "everyone"},
        TypeError,
        "process_group: expected a .*ProcessGroup.*got str",
    ),
}


def good_call():
    return {
        "input": torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]]),
        "running_mean": torch.zeros(CHANNELS),
        "running_var": torch.ones(CHANNELS),
        "weight": torch.ones(CHANNELS),
        "bias": torch.zeros(CHANNELS),
        "training": True,
    }


def bad_call_then_good_call(rank, world_size, name):
    """Rank 1 makes a bad call, catches the error and goes on; rank 0 has been waiting in a good
    one.
    """
    change, error, message = BAD_CALLS[name]
    if rank == 1:
        with counted_communication() as seen, pytest.raises(error, match=message):
            triton_syncbn.sync_batch_norm(**{**good_call(), **change()})
        assert seen == []
    return triton_syncbn.sync_batch_norm(**good_call())


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_raises_before_communication_and_leaves_nobody_waiting(name, reference_ranks):
    """The ranks' next good calls meet: no half of a communication is left over from the bad one."""
    first, second = reference_ranks.run(bad_call_then_good_call, 2, name)
    expected = torch.nn.functional.batch_norm(good_call()["input"], None, None, training=True)
    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "name", ["integers", "not a tensor", "sparse", "nested", "jagged", "mkldnn", "distributed"]
)
def test_a_layer_names_what_is_wrong_with_its_input(name, one_rank):
    change, error, message = BAD_CALLS[name]
    layer = triton_syncbn.convert_sync_batchnorm(torch.nn.BatchNorm1d(CHANNELS))
    with pytest.raises(error, match=message):
        layer(change()["input"])


def raise_and_leave(rank, world_size):
    """Rank 1 raises on bad input and its process group ends, as when its script does."""
    layer = SyncBN(CHANNELS)
    if rank == 1:
        with pytest.raises(ValueError, match=rf"input: expected {CHANNELS} channels"):
            layer(torch.randn(2, CHANNELS + 1))
        return "raised"
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, CHANNELS))
    return "saw its peer leave"


def test_when_a_rank_raises_and_leaves_its_peers_get_an_error(reference_ranks):
    assert reference_ranks.run(raise_and_leave, 2) == ["saw its peer leave", "raised"]


def call_on_a_device_the_group_does_not_serve(rank, world_size):
    layer = SyncBN(CHANNELS, device="meta")
    with (
        counted_communication() as seen,
        pytest.raises(ValueError, match=r"input: expected a device that the process group serves"),
    ):
        layer(torch.empty(2, CHANNELS, device="meta"))
    return seen


def test_a_device_that_the_group_does_not_serve_is_an_error(reference_ranks):
    assert reference_ranks.run(call_on_a_device_the_group_does_not_serve, 2) == [[], []]


def call_in_a_group_of_gpus(rank, world_size):
    layer = SyncBN(CHANNELS, process_group=dist.new_group(backend="cuda:gloo"))
    message = r"input: expected a device that the process group serves \(cuda:gloo\), got cpu"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, CHANNELS))
    with debug():
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(2, CHANNELS))
        assert not communication._calls  # a call that is made again has the same number
    return layer.num_batches_tracked.item()


def test_a_cpu_in_a_group_of_gpus_is_an_error(reference_ranks):
    assert reference_ranks.run(call_in_a_group_of_gpus, 2) == [0, 0]


def two_forwards_one_backward(rank, world_size, broadcast_buffers):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, CHANNELS, 3), SyncBN(CHANNELS), torch.nn.ReLU())
    model = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    torch.manual_seed(1 + rank)
    views = torch.randn(2, 4, 2, 6, 6)
    loss = (model(views[0]) * model(views[1])).mean()
    loss.backward()
    layer = model.module[1]
    return layer.running_mean, model.module[0].weight.grad, layer.num_batches_tracked


@pytest.mark.parametrize("broadcast_buffers", [True, False], ids=["broadcast", "no broadcast"])
def test_two_forwards_before_a_backward_under_ddp(broadcast_buffers, ranks):
    """DDP writes the buffers before the second forward, so backward must not need them."""
    first, second = ranks.run(two_forwards_one_backward, 2, broadcast_buffers)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
    assert first[2].item() == 2
    assert torch.isfinite(first[1]).all()


def ten_steps(rank, world_size):
    torch.manual_seed(rank)
    layer = SyncBN(CHANNELS)
    for step in range(10):
        layer(torch.randn(1 + rank + step % 3, CHANNELS, 4, 3) * (1 + rank) + step)
    return layer.state_dict()


def test_running_statistics_are_bit_identical_on_all_ranks(ranks):
    first, *others = ranks.run(ten_steps, 3)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
