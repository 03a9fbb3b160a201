"""What docs/support.md says of torch.nn.SyncBatchNorm: its own Python, run on two gloo processes.

The five operators that it has for GPUs alone are replaced by plain torch, and the two places lifted
where a CPU is refused. What is read from its source instead is marked in the table.
"""

import contextlib
import copy
import functools
import inspect
import pickle
import re
import tempfile
import textwrap
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.support.ranks import counted_communication

# Rank 0 has 3 of the samples and rank 1 has 2.
BATCH = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SHARES = slice(0, 3), slice(3, 5)


def over_samples(input):
    return [0, *range(2, input.dim())]


def a_channel(value, input):
    return value.view(1, -1, *[1] * (input.dim() - 2))


def batch_norm_stats(input, eps):
    variance, mean = torch.var_mean(input.float(), over_samples(input), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    input, means, rstds, running_mean, running_var, momentum, eps, counts
):
    counts = counts.view(-1, 1).to(means.dtype)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((rstds**-2 - eps + (means - mean) ** 2) * counts).sum(0) / total
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(input, weight, bias, mean, rstd, eps):
    output = (input - a_channel(mean, input)) * a_channel(rstd * weight, input)
    return (output + a_channel(bias, input)).to(input.dtype)


def batch_norm_backward_reduce(grad, input, mean, rstd, weight, *needed):
    sums = grad.sum(over_samples(input))
    products = (grad * (input - a_channel(mean, input))).sum(over_samples(input))
    return sums, products, products * rstd, sums.clone()


def batch_norm_backward_elemt(grad, input, mean, rstd, weight, sums, products, counts):
    total = counts.sum()
    centred = input - a_channel(mean, input)
    grad = grad - a_channel(sums / total, input)
    grad = grad - centred * a_channel(rstd**2 * products / total, input)
    return (grad * a_channel(rstd * weight, input)).to(input.dtype)


STAND_INS = [
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
]


@contextlib.contextmanager
def refused_nowhere():
    """torch's layer and DDP take CPU tensors for those of a GPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for stand_in in STAND_INS:
        library.impl(stand_in.__name__, stand_in)
    source = textwrap.dedent(inspect.getsource(nn.SyncBatchNorm.forward))
    assert source.count('"cuda",') == 1
    namespace = {}
    exec(source.replace('"cuda",', '"cuda", "cpu",'), vars(nn.modules.batchnorm), namespace)
    with (
        mock.patch.object(nn.SyncBatchNorm, "forward", namespace["forward"]),
        mock.patch.object(
            DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None
        ),
    ):
        yield
    library._destroy()


def batch_norm_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid())


def converted(group=None):
    return nn.SyncBatchNorm.convert_sync_batchnorm(batch_norm_model(), group)


def step(model, input):
    model(input).square().sum().backward()


def is_one_big_batch(grad, layer, batches=(BATCH,), tolerance=1e-4):
    """Whether statistics and gradients, averaged over two ranks, are those of one process."""
    one = batch_norm_model()
    for batch in batches:
        step(one, batch)
    close = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance)
    return close(layer.running_mean, one[1].running_mean) and close(2 * grad, one[0].weight.grad)


def on_a_cpu(share):
    converted()(share)


def on_a_cpu_in_ddp(share):
    DistributedDataParallel(converted())


def in_ddp(input, **options):
    model = DistributedDataParallel(converted(), **options)
    step(model, input)
    return is_one_big_batch(model.module[0].weight.grad, model.module[1])


def with_an_empty_rank(share):
    model = DistributedDataParallel(converted())
    step(model, BATCH if dist.get_rank() == 0 else BATCH[:0])
    return is_one_big_batch(model.module[0].weight.grad, model.module[1])


def without_samples(share):
    model = converted()
    step(model, BATCH[:0])
    return int(model[1].num_batches_tracked)


def without_sync(share):
    model = DistributedDataParallel(converted())
    with model.no_sync(), counted_communication() as seen:
        step(model, share)
    step(model, share)
    layer = model.module[1]
    good = is_one_big_batch(model.module[0].weight.grad, layer, (BATCH, BATCH))
    return good, [name for name, *_ in seen]


def out_of_data(share):
    model = DistributedDataParallel(converted())
    with model.join(throw_on_early_termination=True):
        for _ in range(2 - dist.get_rank()):
            step(model, share)


def in_fsdp1(share):
    model = converted()
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    step(model, share)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return is_one_big_batch(model[0].weight.grad, model[1])


def in_fsdp2(share, param_dtype=None):
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(converted(), mesh=mesh, mp_policy=policy)
    step(model, share)
    tolerance = 1e-4 if param_dtype is None else 0.05  # bfloat16 has 8 bits
    grad = model[0].weight.grad.full_tensor()
    assert model[1].running_mean.dtype == torch.float32
    return is_one_big_batch(grad, model[1], tolerance=tolerance)


def under_autocast(share):
    model = DistributedDataParallel(converted())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(share)
    output.float().square().sum().backward()
    return is_one_big_batch(model.module[0].weight.grad, model.module[1], tolerance=0.05)


def checkpointed(share, **options):
    """Batches counted, and forward collectives."""
    model = converted()
    with counted_communication() as seen:
        checkpoint(model, share.clone().requires_grad_(), **options).sum().backward()
    return int(model[1].num_batches_tracked), [name for name, *_ in seen].count("all_gather")


def checkpointed_in_fsdp2(share):
    model = converted()
    model[1] = checkpoint_wrapper(model[1])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    step(model, share)
    return int(model[1].num_batches_tracked)


def save_everything(context, operator, *arguments, **keywords):
    return CheckpointPolicy.MUST_SAVE


def second_derivatives(share):
    input = share.clone().requires_grad_()
    output = nn.SyncBatchNorm(3)(input).pow(3).sum()
    (grad,) = torch.autograd.grad(output, input, create_graph=True)
    grad.square().sum().backward()


def forward_mode(share):
    with torch.autograd.forward_ad.dual_level():
        nn.SyncBatchNorm(3)(torch.autograd.forward_ad.make_dual(share, share))


def transformed(transform):
    def run(share):
        layer = nn.SyncBatchNorm(3, track_running_stats=False)
        transform(lambda input: layer(input).pow(3).sum())(share)

    return run


def mapped_in_eval(share):
    batches = torch.stack([share, share])
    layer = nn.SyncBatchNorm(3).eval()
    return torch.equal(torch.vmap(layer)(batches)[1], layer(share))


def exported(training):
    def run(share):
        program = torch.export.export(converted().train(training), (share,))
        return [str(n.target) for n in program.graph.nodes if n.op == "call_function"][1]

    return run


def exported_alone(share):
    """In a group of one rank."""
    group, _ = dist.new_subgroups(1)
    dist.barrier()
    model, plain = converted(group), batch_norm_model()
    program = torch.export.export(model, (share,)).module()
    for each in (program, plain):
        step(each, share)
    grads = zip(program.parameters(), plain.parameters(), strict=True)
    return all(torch.allclose(one.grad, other.grad) for one, other in grads)


def exported_to_onnx(share):
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(converted().eval(), (share,), f"{folder}/model.onnx", dynamo=True)
    return True


def prepared_for_quantization(share):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = prepare_qat_fx(converted(), get_default_qat_qconfig_mapping(), (share,))
    return [type(layer) for layer in model.modules()].count(nn.SyncBatchNorm)


def compiled(share):
    torch._dynamo.reset()
    step(torch.compile(converted(), fullgraph=True, backend="aot_eager"), share)


def traced(share):
    return [node.op for node in torch.fx.symbolic_trace(converted()).graph.nodes]


def a_subclass(share):
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    layer = nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct(3))
    return isinstance(layer, nn.BatchNorm2d), bool((layer(share) < 0).any())


def a_new_layer(share):
    model = batch_norm_model()
    before = model[1]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)[1] is before


def with_a_group(copier):
    def run(share):
        group = dist.new_group([0, 1])
        dist.barrier()
        copier(converted(group))

    return run


def over_a_mesh(share):
    step(converted(init_device_mesh("cpu", (2,))), share)


def counted_in_floats(share):
    model = converted().type(torch.float64)
    step(model, share.double())
    return model[1].num_batches_tracked.item()


NO_FAKE = "batch_norm_gather_stats_with_counts|fake tensors"
# What each does, or the error that it ends in.
CLAIMS = {
    "ranks with unequal numbers": (in_ddp, True),
    "an empty rank": (with_an_empty_rank, True),
    "no samples on any rank": (without_samples, 1),
    "autocast": (under_autocast, True),
    "static graph": (lambda share: in_ddp(share, static_graph=True), True),
    "no_sync": (without_sync, (True, ["all_gather", "all_reduce"])),
    "join": (out_of_data, "exhausted"),
    "FSDP1": (in_fsdp1, True),
    "FSDP2": (in_fsdp2, True),
    "FSDP2 in bfloat16": (lambda share: in_fsdp2(share, torch.bfloat16), True),
    "compile": (compiled, NO_FAKE),
    "fx": (traced, ["placeholder", *["call_module"] * 3, "output"]),
    "reentrant": (lambda share: checkpointed(share, use_reentrant=True), (2, 2)),
    "not reentrant": (lambda share: checkpointed(share, use_reentrant=False), (2, 2)),
    "selective": (
        lambda share: checkpointed(
            share,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, save_everything),
        ),
        "has been mutated",
    ),
    "second derivatives": (second_derivatives, "derivative for .* is not implemented"),
    "forward mode": (forward_mode, "must implement the jvp function"),
    "grad": (transformed(torch.func.grad), "must override the setup_context"),
    "vmap in training": (transformed(torch.vmap), "must override the setup_context"),
    "vmap in eval": (mapped_in_eval, True),
    "export in eval": (exported(training=False), "aten.batch_norm.default"),
    "export of one process": (exported_alone, True),
    "ONNX": (exported_to_onnx, True),
    "prepare_qat_fx": (prepared_for_quantization, 1),
    "checkpointed in FSDP2": (checkpointed_in_fsdp2, 2),
    "export in training": (exported(training=True), NO_FAKE),
    "deepcopy": (with_a_group(copy.deepcopy), "cannot pickle .*ProcessGroup"),
    "pickle": (with_a_group(pickle.dumps), "cannot pickle .*ProcessGroup"),
    "subclass": (a_subclass, (False, True)),
    "conversion in place": (a_new_layer, False),
    "counter": (counted_in_floats, 1.0),
    "DeviceMesh": (over_a_mesh, "'DeviceMesh' object has no attribute"),
}


REFUSALS = {
    "a CPU": (on_a_cpu, "expected input tensor to be on GPU"),
    "a CPU in DDP": (on_a_cpu_in_ddp, "only work with GPU modules"),
}


def answers(claims, rank):
    found = {}
    for name, (function, _) in claims.items():
        dist.barrier()
        try:
            found[name] = function(BATCH[SHARES[rank]])
        except Exception as error:
            found[name] = str(error)
    return found


def all_answers(rank, world_size):
    refused = answers(REFUSALS, rank)
    with refused_nowhere():
        return refused | answers(CLAIMS, rank)


@pytest.fixture(scope="module")
def found(mortal_ranks):
    return mortal_ranks.run(all_answers, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*REFUSALS, *CLAIMS])
def test_torchs_layer_does_what_the_table_says(name, found):
    if name == "ONNX":
        pytest.importorskip("onnxscript")
    _, expected = (REFUSALS | CLAIMS)[name]
    for answer in found:
        if isinstance(expected, str):
            assert re.search(expected, str(answer[name])), answer[name]
        else:
            assert answer[name] == expected
