"""The kernels against the plain-torch reference and against float64, one launch each."""

import pytest
import torch

from tests.support import oracle
from tests.support.inputs import EDGES, LAYOUTS, SHAPES, random
from tests.support.steps import EPS, kernel, run_steps
from triton_syncbn import reference
from triton_syncbn.operands import RunningStatistics

# A lane that a mask keeps out reaches no result here, whatever it holds.
pytestmark = pytest.mark.usefixtures("undefined_masked_lanes")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of the norm. Half a unit in the last place of a half-precision result is 2e-3 (bfloat16) and
# 2.5e-4 (float16) of its value at most; two implementations that both round right may differ by
# twice that.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}
# Gradients of weight and bias are sums that cancel: some roundings of float32, of larger terms.
SUM_TOLERANCE = 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_agree_with_reference_and_float64(layout, rank, dtype, device):
    shape = SHAPES[rank]
    input = random(shape, dtype, device, layout)
    grad_output = random(shape, dtype, device, layout, seed=1)
    weight = random(shape[1:2], torch.float32, device, seed=2)
    bias = random(shape[1:2], torch.float32, device, seed=3)

    result = run_steps(lambda name: kernel(name, device), input, grad_output, weight, bias)
    plain = run_steps(lambda name: getattr(reference, name), input, grad_output, weight, bias)
    exact = oracle.batch_norm(input.cpu(), grad_output.cpu(), weight.cpu(), bias.cpu(), eps=EPS)

    assert result.output.dtype == input.dtype
    assert result.output.stride() == result.grad_input.stride() == input.stride()
    assert result.num_batches_tracked.item() == 1
    for name in ("output", "grad_input"):
        actual = getattr(result, name)
        assert oracle.relative_error(actual, getattr(plain, name)) <= TOLERANCE[dtype], name
        assert oracle.relative_error(actual.cpu(), getattr(exact, name)) <= TOLERANCE[dtype], name
    # parameters and buffers are float32 here, whatever the input
    for name, limit in (
        ("grad_weight", SUM_TOLERANCE),
        ("grad_bias", SUM_TOLERANCE),
        ("running_mean", 2e-6),
        ("running_var", 2e-6),
    ):
        actual = getattr(result, name)
        assert oracle.relative_error(actual, getattr(plain, name)) <= limit, name
        assert oracle.relative_error(actual.cpu(), getattr(exact, name)) <= limit, name


@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edge_shapes(shape, layout, dtype, device):
    input = random(shape, dtype, device, layout)
    grad_output = random(shape, dtype, device, layout, seed=1)
    weight = random(shape[1:2], torch.float32, device, seed=2)
    bias = random(shape[1:2], torch.float32, device, seed=3)
    result = run_steps(lambda name: kernel(name, device), input, grad_output, weight, bias)
    plain = run_steps(lambda name: getattr(reference, name), input, grad_output, weight, bias)
    count = input.numel() // shape[1]
    # Sums are measured against as many terms of size 1, and where few values are normalized the
    # gradient of the input cancels: it is measured against its terms.
    scales = {"grad_weight": count, "grad_bias": count, "grad_input": 4.0}
    for name, actual in vars(result).items():
        expected = getattr(plain, name)
        assert actual.shape == expected.shape
        if actual.numel():
            error = (actual.double() - expected.double()).abs().max().item()
            scale = max(scales.get(name, 1.0), expected.double().abs().max().item())
            assert error <= scale * (2e-6 if actual.dtype == torch.float32 else 2**-7), name


TILES = [(1, 64), (4, 64), (16, 128)]
FLAT_BLOCKS = [(16, 1), (64, 4), (512, 8)]


@pytest.mark.parametrize("programs", [1, 2, 5, 64, 65, 97])  # above 64 in groups of 32
@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_never_changes_the_result(layout, tile, programs, device):
    """Large and small tiles, few programs and many: the same moments, and the same size of them."""
    from triton_syncbn.kernels.launch_config import LaunchConfig

    tiled = LaunchConfig(*TILES[tile], programs, 4)
    columns, warps = FLAT_BLOCKS[(tile + programs) % 3]
    writing = tiled if layout == "channels_last" else LaunchConfig(1, columns, programs, warps)
    shape = (5, 2, 7, 3)
    input = random(shape, torch.float32, device, layout, mean=3.0)
    grad_output = random(shape, torch.float32, device, layout, seed=1)

    moments = kernel("moments", device)(input, tiled)
    assert moments.shape == (2 * shape[1] + 1,)
    assert moments.dtype == torch.float64
    assert oracle.relative_error(moments, reference.moments(input)) <= 1e-6
    arguments = input, moments, None, None
    output = kernel("normalize", device)(*arguments, eps=1e-5, config=writing)
    assert oracle.relative_error(output, reference.normalize(*arguments, eps=1e-5)) <= 1e-6
    arguments = grad_output, input, moments, None, None, 1e-5
    sums, *_ = kernel("grad_moments", device)(*arguments, config=tiled)
    assert oracle.relative_error(sums, reference.grad_moments(*arguments)[0]) <= SUM_TOLERANCE
    arguments = grad_output, input, moments, sums, None, 1e-5
    grad_input = kernel("grad_input", device)(*arguments, config=writing)
    assert oracle.relative_error(grad_input, reference.grad_input(*arguments)) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_64_bits(layout, device, monkeypatch):
    """Blocks of large tensors are addressed with 64 bits; here a small one is, with the same
    result.
    """
    from triton_syncbn.kernels import launch, launch_config

    input = random((3, 5, 9, 6), torch.float32, device, layout)
    moments = reference.moments(input)
    sums = torch.ones(10, dtype=torch.float64, device=device)
    results = []
    for threshold in (launch_config.WIDE_FROM, 0):
        monkeypatch.setattr(launch_config, "WIDE_FROM", threshold)
        launch._plan.cache_clear()
        output = kernel("normalize", device)(input, moments, None, None, eps=1e-5)
        grad_input = kernel("grad_input", device)(input, input, moments, sums, None, 1e-5)
        results.append((output, grad_input))
    launch._plan.cache_clear()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_config_that_cuts_rows_in_tiles_of_several_is_an_error(device):
    from triton_syncbn.kernels.launch_config import LaunchConfig

    input = random((4, 2, 100), torch.float32, device)
    with pytest.raises(ValueError, match="config: expected block_columns that hold a row of 100"):
        kernel("moments", device)(input, LaunchConfig(2, 64, 1, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_storage(layout, device):
    """A tensor that starts one element into its storage, as a slice of a larger one does."""
    shape = (3, 4, 5, 7)
    values = random(shape, torch.float32, device, layout)
    storage = torch.full((values.numel() + 1,), torch.nan, device=device)
    input = storage[1:].as_strided(values.shape, values.stride(), 1).copy_(values)
    moments, expected = (kernel("moments", device)(tensor) for tensor in (input, values))
    # compiled for other addresses, lanes may add up other values
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_outside_the_tensor_is_read(layout, device):
    """NaN before and after the tensor, in the same storage, reaches no result."""
    for shape in ((3, 5, 3, 7), (1, 3, 35, 1), (2, 3, 1, 1)):
        values = random(shape, torch.float32, device, layout)
        storage = torch.full((values.numel() + 128,), torch.nan, device=device)
        input = storage.as_strided(values.shape, values.stride(), 64).copy_(values)
        result = run_steps(
            lambda name: kernel(name, device),
            input,
            input,
            values.new_ones(shape[1]),
            values.new_ones(shape[1]),
        )
        assert all(torch.isfinite(tensor).all() for tensor in vars(result).values())


@pytest.mark.parametrize("poisoned", ["input", "grad_output"])
@pytest.mark.parametrize("shape", [(4, 6, 3, 7), (2, 4, 517), (300, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_channel(layout, shape, poisoned, device):
    """Rows of odd length share vectors with the channels beside them."""
    tensors = {
        "input": random(shape, torch.bfloat16, device, layout),
        "grad_output": random(shape, torch.bfloat16, device, layout, seed=1),
        "weight": random(shape[1:2], torch.float32, device, seed=2),
        "bias": random(shape[1:2], torch.float32, device, seed=3),
    }
    finite = run_steps(lambda name: kernel(name, device), **tensors)
    tensors[poisoned][:, 1], tensors[poisoned][:, 3] = torch.nan, torch.inf
    result = run_steps(lambda name: kernel(name, device), **tensors)
    others = [channel for channel in range(shape[1]) if channel not in (1, 3)]
    for name, actual in vars(result).items():
        if name != "num_batches_tracked":
            axis = min(actual.dim() - 1, 1)
            index = torch.tensor(others, device=device)
            expected = getattr(finite, name).index_select(axis, index)
            assert torch.equal(actual.index_select(axis, index), expected), name


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_mix(dtype, parameter_dtype, device):
    shape = (4, 6, 5, 5)
    input, grad_output = (random(shape, dtype, device, seed=seed) for seed in (0, 1))
    weight, bias = (random(shape[1:2], parameter_dtype, device, seed=seed) for seed in (2, 3))
    result = run_steps(lambda name: kernel(name, device), input, grad_output, weight, bias)
    exact = oracle.batch_norm(input.cpu(), grad_output.cpu(), weight.cpu(), bias.cpu(), eps=EPS)
    assert result.grad_weight.dtype == result.grad_bias.dtype == parameter_dtype
    assert oracle.relative_error(result.output.cpu(), exact.output) <= TOLERANCE[dtype]
    assert oracle.relative_error(result.grad_input.cpu(), exact.grad_input) <= TOLERANCE[dtype]
    limit = max(TOLERANCE[parameter_dtype], SUM_TOLERANCE)
    assert oracle.relative_error(result.grad_weight.cpu(), exact.grad_weight) <= limit
    assert oracle.relative_error(result.grad_bias.cpu(), exact.grad_bias) <= limit


@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_are_updated_in_float64(momentum, device):
    """The step towards the batch is rounded once, to the dtype of the buffer; the momentum never.

    257 channels are more than a program takes at once: two share them, or with no momentum one has
    them all.
    """
    channels = 257
    input = random((8, channels, 2), torch.float32, device, mean=2.0)
    moments = kernel("moments", device)(input)
    mean, variance, count = (tensor.cpu() for tensor in reference.mean_and_variance(moments))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        start = {"mean": 0.3, "var": 0.7}
        buffers = {
            name: torch.full((channels,), value, dtype=dtype, device=device)
            for name, value in start.items()
        }
        before = {name: buffer.double().cpu().clone() for name, buffer in buffers.items()}
        counter = torch.tensor(2, device=device)
        kernel("normalize", device)(
            *(input, moments, None, None),
            eps=EPS,
            running=RunningStatistics(**buffers, num_batches_tracked=counter, momentum=momentum),
        )
        factor = 1 / 3 if momentum is None else momentum
        batch = {"mean": mean, "var": variance * count / (count - 1)}
        for name, buffer in buffers.items():
            expected = before[name] + factor * (batch[name] - before[name])
            # in float64 some roundings, there and here
            limit = 4 if dtype == torch.float64 else 0.501
            assert oracle.error_in_ulp(buffer.cpu(), expected) <= limit, (dtype, name)


def test_counts_beyond_32_bits(device):
    """The statistics come from the count of the global batch, here 2**33, not from the tensor."""
    input = random((4, 3, 5), torch.float32, device)
    moments = kernel("moments", device)(input)
    scaled = moments * (2**33 / moments[-1])
    outputs = [
        kernel("normalize", device)(input, m, None, None, eps=1e-5) for m in (moments, scaled)
    ]
    assert torch.equal(*outputs)
