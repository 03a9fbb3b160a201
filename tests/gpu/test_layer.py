"""What only a GPU can show: the layer on CUDA tensors, no host synchronization, CUDA graphs,
streams.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from layers.implementations import synchronized_even_alone

from tests.support import oracle
from tests.support.batches import (
    HARD,
    SPLITS,
    assert_exact_in_float32,
    assert_exact_in_half,
    exact_result,
    joined,
    make_batch,
    train_one_step,
)
from triton_syncbn import SyncBN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def train_one_step_on_gpu(rank, world_size, batch):
    """As train_one_step, with the tensors of every rank on the first GPU."""
    with torch.device("cuda"):
        on_gpu = batch._replace(
            **{
                name: value.cuda()
                for name, value in batch._asdict().items()
                if isinstance(value, torch.Tensor)
            }
        )
        result = train_one_step(rank, world_size, on_gpu)
    return oracle.Result(**{name: tensor.cpu() for name, tensor in vars(result).items()})


def run(reference_ranks, batch):
    results = reference_ranks.run(train_one_step_on_gpu, len(batch.sizes), batch)
    return joined(results), exact_result(batch)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_is_one_big_batch(sizes, reference_ranks):
    """Several processes on one GPU; gloo carries the CUDA tensors."""
    assert_exact_in_float32(*run(reference_ranks, make_batch(sizes)))


@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_hard_data(make, reference_ranks):
    assert_exact_in_float32(*run(reference_ranks, make((4, 3), torch.float32)))
    batch = make((4, 3), torch.bfloat16)
    assert_exact_in_half(*run(reference_ranks, batch), batch.weight, batch.bias)


@pytest.mark.parametrize(
    "shape", [(4, 64, 112, 112), (16, 3, 257, 255), (8, 512, 7, 7), (4096, 96)]
)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_maps(shape, layout, dtype):
    """Maps large enough to split their channels over many programs, against float64."""
    torch.manual_seed(0)
    input = (torch.randn(shape, device="cuda") + 3).to(dtype)
    grad_output = torch.randn(shape, device="cuda").to(dtype)
    if layout == "channels_last":
        input, grad_output = (
            t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (input, grad_output)
        )
    layer = SyncBN(shape[1], device="cuda")
    leaf = input.clone().requires_grad_()
    output = layer(leaf)
    output.backward(grad_output)
    exact = oracle.batch_norm(input.cpu(), grad_output.cpu())
    actual = oracle.Result(
        output.detach().cpu(),
        leaf.grad.cpu(),
        running_mean=layer.running_mean.cpu(),
        running_var=layer.running_var.cpu(),
    )
    if dtype == torch.bfloat16:
        assert_exact_in_half(actual, exact, torch.ones(shape[1]), torch.zeros(shape[1]))
        return
    for name in ("output", "running_mean", "running_var"):
        assert oracle.relative_error(getattr(actual, name), getattr(exact, name)) <= 2e-6, name
    assert oracle.relative_error(actual.grad_input, exact.grad_input) <= 5e-6


@pytest.mark.xdist_group("much memory")  # one at a time
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    """Offsets beyond 32 bits: the last sample is normalized like the first, with the right sums."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU with 40 GB of memory")
    samples, channels, size = 3, 11, 8192
    shape = (samples, size, size, channels) if layout == "channels_last" else None
    input = torch.empty(
        shape or (samples, channels, size, size), device="cuda", dtype=torch.bfloat16
    )
    assert input.numel() > 2**31
    input = input.movedim(-1, 1) if layout == "channels_last" else input
    for sample in range(samples):
        input[sample].normal_(mean=sample)
    layer = SyncBN(channels, affine=False, momentum=1.0, device="cuda")
    leaf = input.requires_grad_()
    output = layer(leaf)
    mean = torch.stack([x.double().mean((1, 2)) for x in input.detach()]).mean(0)
    square = torch.stack([x.double().square().mean((1, 2)) for x in input.detach()]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=2e-6, atol=1e-7)
    rstd = (square - mean**2 + layer.eps).rsqrt()
    for sample in (0, samples - 1):
        part = input.detach()[sample, :, -3:].double()
        expected = (part - mean[:, None, None]) * rstd[:, None, None]
        actual = output.detach()[sample, :, -3:]
        assert oracle.relative_error(actual, expected) <= 2**-8
    # dy = y leaves of dx only the rounding of y: half a unit in the last place of 4 to 8
    output.backward(output.detach())
    for sample in (0, samples - 1):
        assert leaf.grad[sample, :, -3:].abs().max() < 0.02


@pytest.fixture
def nccl_group():
    """A group of one rank, whose all_reduce is NCCL's and really runs."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def synchronized_step(layer: SyncBN, input: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Forward and backward with their all_reduce, though the group has one rank."""
    with synchronized_even_alone():
        output = layer(input)
    output.backward(grad)
    return output


@contextlib.contextmanager
def host_synchronization_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("samples", [8, 0])
def test_a_training_step_never_stalls_the_host(samples, momentum, nccl_group):
    layer = SyncBN(64, momentum=momentum, device="cuda")
    input = torch.randn(samples, 64, 56, 56, device="cuda", requires_grad=True)
    grad = torch.randn_like(input)
    synchronized_step(layer, input, grad)
    with host_synchronization_is_an_error():
        for _ in range(3):
            synchronized_step(layer, input, grad)


@pytest.mark.parametrize("samples", [8, 0])
def test_captured_in_a_cuda_graph(samples, nccl_group):
    """Replays of the captured step give what eager steps give; with an empty rank too."""
    layers = [SyncBN(64, device="cuda") for _ in range(2)]
    input = torch.randn(samples, 64, 56, 56, device="cuda", requires_grad=True)
    grad = torch.randn_like(input)
    warm = SyncBN(64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            synchronized_step(warm, input, grad)
    torch.cuda.current_stream().wait_stream(stream)
    input.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = synchronized_step(layers[0], input, grad)
    captured_grad = input.grad
    for _ in range(3):
        graph.replay()
    input.grad = None
    for _ in range(3):
        input.grad = None
        eager = synchronized_step(layers[1], input, grad)
    assert torch.equal(captured, eager)
    assert torch.equal(captured_grad, input.grad)
    for name, tensor in layers[0].named_buffers():
        assert torch.equal(tensor, dict(layers[1].named_buffers())[name]), name


def test_streams_do_not_share_a_reduction():
    """Split reductions on two streams at once: each has the result it has alone."""
    inputs = [torch.randn(8, 4, 512, 512, device="cuda") + i for i in range(2)]
    layers = [SyncBN(4, device="cuda") for _ in inputs]
    alone = [layer(input) for layer, input in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, layer, input in zip(streams, layers, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer(input))
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(results, alone, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_input_gives_the_same_bits(layout):
    input = torch.randn(8, 48, 100, 90, device="cuda").to(memory_format=layout).requires_grad_()
    grad = torch.randn_like(input)
    runs = []
    for _ in range(20):
        layer = SyncBN(48, device="cuda")
        input.grad = None
        output = layer(input)
        output.backward(grad)
        runs.append([output, input.grad, layer.weight.grad, layer.bias.grad, layer.running_var])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_compiles_with_inductor():
    model = torch.nn.Sequential(SyncBN(16), torch.nn.ReLU()).cuda()
    input = torch.randn(4, 16, 20, 20, device="cuda", requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(input), model(input))
    compiled(input).sum().backward()
    assert torch.isfinite(input.grad).all()
