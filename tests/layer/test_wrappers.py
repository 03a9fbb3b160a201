"""What models are wrapped in: DistributedDataParallel, FSDP and autocast. Over two ranks they give
the step of one process with the whole batch.
"""

import contextlib

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import counted_communication
from triton_syncbn import checkpoint_contexts, convert_sync_batchnorm

ROUNDING = 2.0**-8  # of bfloat16, relative
# Rank 0 has 3 samples and rank 1 has 2, in each of two batches.
BATCHES = torch.randn(
    2, 5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
SHARES = slice(0, 3), slice(3, 5)


def batch_norm_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        ),
        torch.nn.Sequential(
            torch.nn.Conv2d(4, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Sigmoid()
        ),
    ).double()


def one_process(batches):
    """Gradients of the sum of all losses, halved as two ranks average theirs; and buffers."""
    model = batch_norm_model()
    for batch in batches:
        model(batch).square().sum().backward()
    return (
        {name: parameter.grad / 2 for name, parameter in model.named_parameters()},
        dict(model.named_buffers()),
    )


def in_bfloat16(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch.float())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()


def assert_as_near_as_torch(answers):
    """Gradients in bfloat16 are no further from float64 than twice what one process of torch is;
    running statistics are float32, of maps that were rounded once, and the same on all ranks.
    """
    grads, buffers = one_process(BATCHES[:1])
    theirs = batch_norm_model().float()
    in_bfloat16(theirs, BATCHES[0])
    for actual_grads, actual_buffers in answers:
        for name, parameter in theirs.named_parameters():
            exact = grads[name]
            error = (actual_grads[name].double() - exact).norm()
            assert actual_grads[name].dtype == torch.float32
            assert error <= 2 * (parameter.grad.double() / 2 - exact).norm(), name
        for name, buffer in actual_buffers.items():
            assert buffer.dtype in (torch.float32, torch.int64)
            torch.testing.assert_close(
                buffer.double(), buffers[name].double(), rtol=2 * ROUNDING, atol=ROUNDING
            )
            assert torch.equal(buffer, answers[0][1][name])


def full(value):
    """A parameter, or what a rank has of it put together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def results(model, prefix=""):
    return (
        {name.replace(prefix, ""): full(p.grad) for name, p in model.named_parameters()},
        {name.replace(prefix, ""): b.clone() for name, b in model.named_buffers()},
    )


def ddp_step(rank, world_size, options, accumulate):
    model = DistributedDataParallel(convert_sync_batchnorm(batch_norm_model()), **options)
    with counted_communication() as seen:
        for index, batch in enumerate(BATCHES if accumulate else BATCHES[:1]):
            last = index == 1 or not accumulate
            with contextlib.nullcontext() if last else model.no_sync():
                model(batch[SHARES[rank]]).square().sum().backward()
    passes = [shape for name, shape, _ in seen if name == "all_reduce"]
    assert passes == [(9,), (9,), (8,), (8,)] * (2 if accumulate else 1)
    return results(model, "module.")


OPTIONS = [
    {},
    {"static_graph": True},
    {"gradient_as_bucket_view": True, "broadcast_buffers": False},
    {"find_unused_parameters": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ddp(options, reference_ranks):
    expected = one_process(BATCHES[:1])
    for answer in reference_ranks.run(ddp_step, 2, options, False):
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_ddp_no_sync(options, reference_ranks):
    """Gradients of two batches add up before they are reduced; statistics are synchronized in each.
    A static graph allows no no_sync in its first step.
    """
    expected = one_process(BATCHES)
    for answer in reference_ranks.run(ddp_step, 2, options, True):
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


def ddp_with_uneven_batches(rank, world_size):
    """Rank 1 is out of data after one batch."""
    model = DistributedDataParallel(convert_sync_batchnorm(batch_norm_model()))
    steps = 0
    with (
        pytest.raises(RuntimeError, match="exhausted"),
        model.join(throw_on_early_termination=True),
    ):
        for batch in BATCHES[: 2 - rank]:
            model(batch[SHARES[rank]]).square().sum().backward()
            steps += 1
    return steps


def test_ddp_join_ends_where_a_rank_is_out_of_data(reference_ranks):
    """throw_on_early_termination is what torch's join has for models that communicate."""
    assert reference_ranks.run(ddp_with_uneven_batches, 2) == [1, 1]


def ddp_with_empty_batches(rank, world_size):
    """Rank 1 goes on with no samples where it is out of data."""
    model = DistributedDataParallel(convert_sync_batchnorm(batch_norm_model()))
    for index, batch in enumerate(BATCHES):
        share = batch[:0] if rank == 1 and index == 1 else batch[SHARES[rank]]
        model(share).square().sum().backward()
    return results(model, "module.")


def test_ddp_with_empty_batches(reference_ranks):
    expected = one_process([BATCHES[0], BATCHES[1, SHARES[0]]])
    for answer in reference_ranks.run(ddp_with_empty_batches, 2):
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


def fsdp1_step(rank, world_size):
    model = convert_sync_batchnorm(batch_norm_model())
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    model(BATCHES[0][SHARES[rank]]).square().sum().backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return results(model, "_fsdp_wrapped_module.")


def test_fsdp1(reference_ranks):
    expected = one_process(BATCHES[:1])
    for answer in reference_ranks.run(fsdp1_step, 2):
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


def fsdp2_step(rank, world_size, policy, dtype, each_block, checkpointed=False):
    model = convert_sync_batchnorm(batch_norm_model()).to(dtype)
    mesh = init_device_mesh("cpu", (2,))
    for index, block in enumerate(model):
        if checkpointed:
            model[index] = checkpoint_wrapper(block, context_fn=checkpoint_contexts)
        if each_block:
            fully_shard(model[index], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    with counted_communication() as seen:
        model(BATCHES[0][SHARES[rank]].to(dtype)).square().sum().backward()
    passes = [shape for name, shape, _ in seen if name == "all_reduce"]
    assert passes == [(9,), (9,), (8,), (8,)]
    return results(model, "_checkpoint_wrapped_module.")


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("each_block", [False, True], ids=["whole", "blocks"])
def test_fsdp2(each_block, checkpointed, reference_ranks):
    expected = one_process(BATCHES[:1])
    for answer in reference_ranks.run(
        fsdp2_step, 2, MixedPrecisionPolicy(), torch.float64, each_block, checkpointed
    ):
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)


def test_fsdp2_in_bfloat16(reference_ranks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert_as_near_as_torch(reference_ranks.run(fsdp2_step, 2, policy, torch.float32, False))


def autocast_step(rank, world_size):
    model = DistributedDataParallel(convert_sync_batchnorm(batch_norm_model()).float())
    in_bfloat16(model, BATCHES[0][SHARES[rank]])
    return results(model, "module.")


def test_autocast(reference_ranks):
    assert_as_near_as_torch(reference_ranks.run(autocast_step, 2))
