"""The four steps on a CPU against the plain-torch reference and float64: the way of small tensors,
and that of large ones on tensors that are small enough for a test.
"""

import contextlib

import pytest
import torch
from numerics import examples, training
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import blocks, oracle
from tests.support.exactness import NOISE, faults
from tests.support.inputs import EDGES, LAYOUTS, SHAPES, lay_out, random
from tests.support.steps import EPS, run_steps
from triton_syncbn import SyncBN, cpu, ops, reference
from triton_syncbn.cpu import general, memory, small, statistics
from triton_syncbn.cpu import layer as cpu_layer
from triton_syncbn.cpu import sums as cpu_sums
from triton_syncbn.cpu.general import General
from triton_syncbn.cpu.plain import Plain
from triton_syncbn.cpu.small import Small
from triton_syncbn.operands import RunningStatistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Of the norm. Half a unit in the last place of a half-precision result is 2e-3 (bfloat16) and
# 2.5e-4 (float16) of its value at most; two implementations that both round right may differ by
# twice that.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}
# Gradients of weight and bias are sums that cancel: some roundings of float32, of larger terms.
SUM_TOLERANCE = 5e-6
SMALLEST_BLOCK = (
    100  # elements: some tensors here are then several blocks, of which the last is cut
)


@pytest.fixture(params=["small", "one block", "blocks"], autouse=True)
def way(request, monkeypatch):
    """How tensors are treated, whatever their size."""
    largest = 1 << 62 if request.param == "small" else 0
    for name in ("LARGEST", "LARGEST_IN_ONE_CALL"):
        monkeypatch.setattr(small, name, largest)
    if request.param != "one block":
        monkeypatch.setattr(memory, "BLOCK", SMALLEST_BLOCK)
    cpu_layer._ways.cache_clear()
    yield request.param
    cpu_layer._ways.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "expected"),
    [
        ((4, 64, 28, 28), torch.float32, "channels_first", Plain),
        ((1, 2048, 25, 25), torch.bfloat16, "channels_first", Plain),
        ((1, 64, 200, 200), torch.float32, "channels_first", Plain),  # nothing that can be cut
        ((4, 64, 80, 80), torch.float32, "channels_first", General),  # two blocks
        ((4, 64, 28, 28), torch.float32, "channels_last", General),
        ((4, 64, 28, 28), torch.float64, "channels_first", General),
        ((512, 256), torch.float32, "channels_first", General),
        ((1, 37, 16, 11), torch.float32, "channels_first", Small),
    ],
    ids=str,
)
def test_the_way_of_a_geometry(shape, dtype, layout, expected, monkeypatch):
    monkeypatch.undo()
    input = lay_out(torch.empty(shape, dtype=dtype), layout)
    far, near = cpu_layer._ways(input.shape, input.is_contiguous(), dtype)
    assert type(near) is expected
    assert type(far) is (Small if expected is Small else General)


def steps_of(module):
    return lambda name: getattr(module, name)


def operands(shape, dtype, layout, mean=0.5, parameters=torch.float32):
    return (
        random(shape, dtype, "cpu", layout, mean),
        random(shape, dtype, "cpu", layout, seed=1),
        random(shape[1:2], parameters, "cpu", seed=2),
        random(shape[1:2], parameters, "cpu", seed=3),
    )


@pytest.mark.parametrize("mean", [0.5, 30.0], ids="mean {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference_and_float64(layout, rank, dtype, mean):
    tensors = operands(SHAPES[rank], dtype, layout, mean)
    result = run_steps(steps_of(cpu), *tensors)
    plain = run_steps(steps_of(reference), *tensors)
    exact = oracle.batch_norm(*tensors, eps=EPS)
    for name, actual in vars(result).items():
        assert actual.dtype == getattr(plain, name).dtype, name
        assert actual.stride() == getattr(plain, name).stride(), name
        limit = {"grad_weight": SUM_TOLERANCE, "grad_bias": SUM_TOLERANCE}.get(name)
        limit = limit or TOLERANCE[actual.dtype if name.startswith("running") else dtype]
        if name != "num_batches_tracked":
            assert oracle.relative_error(actual, getattr(plain, name)) <= limit, name
            assert oracle.relative_error(actual, getattr(exact, name)) <= limit, name
    assert result.num_batches_tracked == 1


@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edge_shapes(shape, layout, dtype):
    tensors = operands(shape, dtype, layout)
    result, plain = (run_steps(steps_of(module), *tensors) for module in (cpu, reference))
    count = tensors[0].numel() // shape[1]
    # Sums are measured against as many terms of size 1, and where few values are normalized the
    # gradient of the input cancels: it is measured against its terms, which rstd makes large where
    # one value has no variance.
    rstd = 4.0 if count > 1 else 1e-5**-0.5
    scales = {"grad_weight": count, "grad_bias": count, "grad_input": rstd}
    for name, actual in vars(result).items():
        expected = getattr(plain, name)
        assert (actual.shape, actual.stride()) == (expected.shape, expected.stride()), name
        if actual.numel():
            error = (actual.double() - expected.double()).abs().max().item()
            scale = max(scales.get(name, 1.0), expected.double().abs().max().item())
            assert error <= scale * (2e-6 if actual.dtype == torch.float32 else 2**-7), name


# Means are near 0, at the border of what is near, and far; float32 data of a large mean lies on a
# coarse lattice, where roundings of long sums are no longer as often up as down.
DATA = {
    "near": {},
    "border": {"mean": statistics.NEAR},
    "far": {"mean": 1e2},
    "lattice": {"mean": 1e4},
    "no digits": {"mean": 1e6},
    "outlier": {"outlier": True},
    "tiny": {"std": 1e-6},
    "constant": {"std": 0.0},
    "grad far": {"grad_mean": 1e3},
}
MAPS = {
    "long rows": {"sizes": (1, 2), "channels": 3, "spatial": (97, 97)},  # cut into rows of 97
    "short rows": {"sizes": (3, 4), "channels": 37, "spatial": (7, 7)},
    "rows of a prime": {"sizes": (2,), "channels": 2, "spatial": (4099,)},
    "no rows": {"sizes": (200, 55), "channels": 19, "spatial": ()},
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hard_data_is_exact(layout, dtype, map, data):
    example = examples.make_example(dtype=dtype, layout=layout, **MAPS[map], **DATA[data])
    assert not faults(example, training.train_steps("cpu", example))


MEANS = (0.0, 2.0, 1e4)


def with_means(first, others):
    input = random((4, 3, 100, 100), torch.float32, "cpu", "channels_last")
    values = input.permute(0, 2, 3, 1).view(-1, 3)
    values[:64] += first
    values[64:] += others
    return input, values


@pytest.mark.parametrize("before", [0.0, 1e4])
@pytest.mark.parametrize("means", [(0.0, 1e4), (1e4, 0.0)], ids=str)
def test_first_values_may_be_unlike_the_others(means, before):
    """Whether means are far is guessed from the first, if they were far in the call before;
    deviations from a wrong guess cancel.
    """
    cpu.moments(with_means(before, before)[0])
    input, values = with_means(*means)
    total, squares, count = cpu.moments(input).tensor_split((3, 6))
    variance = squares / count - (total / count) ** 2
    expected, mean = torch.var_mean(values.double(), 0, correction=0)
    assert oracle.relative_error(variance, expected) <= 1e-6
    assert ((total / count - mean).abs() <= 1e-6 * expected.sqrt()).all()


def half_filled(value):
    """Means of one deviation: whether they are near hangs on roundings."""
    input = torch.zeros(4, 8, 32, 32)
    input[:, :, :16] = value
    return input.to(memory_format=torch.channels_last)


def large(deviation):
    """Squares that overflow in float32 where many are added up."""
    input = 2e18 + deviation * torch.randn(4, 256, 16, 16)
    return input.to(memory_format=torch.channels_last)


HISTORIES = {
    **{f"{first}, {others}": (with_means, first, others) for first in MEANS for others in MEANS},
    **{f"half {value}": (half_filled, value) for value in (0.01, 0.1, 0.7, 1.3, 1.99)},
    "large": (large, 1e14),
}


@pytest.mark.parametrize("data", HISTORIES)
def test_bits_do_not_hang_on_the_call_before(data):
    make, *values = HISTORIES[data]
    torch.manual_seed(0)
    input = make(*values)
    input = input[0] if make is with_means else input
    far = (torch.randn(input.shape) + 1e4).to(memory_format=torch.channels_last)
    cpu_layer._ways.cache_clear()
    found = [cpu.moments(input), cpu.moments(input)]
    for before in (far, far - 1e4, far):
        cpu.moments(before)
        found += [cpu.moments(input), cpu.moments(input)]
    assert all(torch.equal(moments, found[0]) for moments in found)
    assert {vars(moments)["is_near"] for moments in found} == {vars(found[0])["is_near"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 256, 16, 16), (64, 40, 8, 8), (1024, 256)], ids=str)
def test_squares_may_overflow(shape, layout, plain_torch):
    torch.manual_seed(0)
    input = lay_out(2e18 + 1e14 * torch.randn(shape), layout if len(shape) == 4 else LAYOUTS[0])
    output = SyncBN(shape[1])(input)
    exact = torch.nn.BatchNorm2d(shape[1], dtype=torch.float64)
    expected = exact(input.double().view(*shape[:2], *(shape[2:] or (1, 1)))).view(shape)
    assert oracle.relative_error(output.detach(), expected.detach()) <= 1e-6


def test_far_means_are_guessed_after_the_first_call(way, monkeypatch):
    passes = []
    count = lambda *arguments: passes.append(1) or cpu_sums.add_up(*arguments)  # noqa: E731
    monkeypatch.setattr(general, "add_up", count)
    cpu_layer._ways.cache_clear()
    taken = []
    for mean in (0.0, 1e4, 1e4, 0.0):
        passes.clear()
        cpu.moments(with_means(mean, mean)[0])
        taken.append(len(passes))
    assert taken == ([0, 0, 0, 0] if way == "small" else [1, 2, 1, 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_may_have_other_means(layout, dtype):
    """Near 0, far, and no samples; the last channel has no variance. Each rank has its own way, and
    all have the same statistics.
    """
    shape, means = (7, 4, 9, 11), (0.3, 1e3, 0.0)
    maps = [random(shape, dtype, "cpu", layout, mean, seed=n) for n, mean in enumerate(means)]
    for map in maps:
        map[:, -1] = 1000003.1  # 1386 of them, for whose variance float64 leaves 1e-4
    maps[2] = maps[2][:0]
    gradients = [torch.randn_like(map) for map in maps]
    _, _, weight, bias = operands(shape, torch.float32, layout)
    moments = [cpu.moments(map) for map in maps]
    total = sum(moments).clone()
    outputs, buffers = [], []
    for map, sums in zip(maps, moments, strict=True):
        sums.copy_(total)  # as an all_reduce does
        running = RunningStatistics(torch.zeros(4), torch.ones(4), torch.tensor(0), 0.1)
        outputs.append(cpu.normalize(map, sums, weight, bias, eps=EPS, running=running))
        buffers.append(torch.cat(running[:2]))
    operands_of_ranks = list(zip(gradients, maps, moments, strict=True))
    sums = sum(cpu.grad_moments(*rank, None, None, EPS)[0] for rank in operands_of_ranks)
    results = [cpu.grad_input(*rank, sums, weight, EPS) for rank in operands_of_ranks]

    assert torch.equal(buffers[0], buffers[1])
    assert torch.equal(buffers[0], buffers[2])
    assert buffers[0][-1] == torch.tensor(0.9)  # the variance moves towards 0
    exact = oracle.batch_norm(torch.cat(maps), torch.cat(gradients), weight, bias, eps=EPS)
    for actual, expected in ((outputs, exact.output), (results, exact.grad_input)):
        for rank, part in zip(actual, expected.split([len(map) for map in maps]), strict=True):
            varies = part[:, :-1]
            assert oracle.relative_error(rank[:, :-1], varies) <= TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 128, 128), (40, 3, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_that_repeat_add_up(shape, layout, dtype):
    """As those of a mean do: in one chain, float32 would lose 1e-5 of their sum."""
    input = random(shape, dtype, "cpu", layout)
    grad_output = lay_out(torch.full(shape, 1 / 3, dtype=dtype), layout)
    moments = cpu.moments(input)
    sums, *_ = cpu.grad_moments(grad_output, input, moments, None, None, 1e-5)
    expected = grad_output.double().sum([0, *range(2, len(shape))])
    assert oracle.relative_error(sums[: shape[1]], expected) <= NOISE


@pytest.mark.parametrize("parameters", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffers", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
def test_parameters_and_buffers_of_any_dtype(parameters, buffers, momentum):
    input, grad_output, weight, bias = operands((6, 5, 40), torch.float32, LAYOUTS[0])
    weight, bias = (parameters and tensor.to(parameters) for tensor in (weight, bias))
    results = []
    for module in (cpu, reference):
        mean, variance = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).to(buffers)
        counter = torch.tensor(3)
        moments = module.moments(input)
        output = module.normalize(
            *(input, moments, weight, bias),
            eps=1e-5,
            running=RunningStatistics(mean, variance, counter, momentum),
        )
        sums, *grads = module.grad_moments(
            grad_output, input, moments, parameters, parameters, 1e-5
        )
        grad_input = module.grad_input(grad_output, input, moments, sums, weight, 1e-5)
        results.append((output, mean, variance, counter, sums, *grads, grad_input))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        limit = TOLERANCE[torch.float16] if actual.dtype.itemsize == 2 else SUM_TOLERANCE
        assert oracle.relative_error(actual, expected) <= limit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_channel(layout, value):
    tensors = operands((3, 4, 9, 9), torch.float32, layout)
    tensors[0][1, 2, 3, 4] = value
    result, plain = (run_steps(steps_of(module), *tensors) for module in (cpu, reference))
    for name, actual in vars(result).items():
        expected = getattr(plain, name)
        assert torch.equal(actual.isfinite(), expected.isfinite()), name
        if actual.dim():
            channels = actual.transpose(0, 1) if actual.dim() > 1 else actual
            assert channels[[0, 1, 3]].isfinite().all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_another_dtype_keeps_its_digits(layout):
    input, grad_output, weight, bias = operands((4, 3, 20, 20), torch.bfloat16, layout)
    grad_output = grad_output.float() + 1e-4
    result, plain = (
        run_steps(steps_of(module), input, grad_output, weight, bias) for module in (cpu, reference)
    )
    assert oracle.relative_error(result.grad_bias, plain.grad_bias) <= SUM_TOLERANCE
    assert oracle.relative_error(result.grad_weight, plain.grad_weight) <= SUM_TOLERANCE


def test_several_threads_compute_the_same():
    tensors = operands((5, 6, 30, 30), torch.bfloat16, LAYOUTS[0])
    alone = run_steps(steps_of(cpu), *tensors)
    torch.set_num_threads(2)
    try:
        together = run_steps(steps_of(cpu), *tensors)
    finally:
        torch.set_num_threads(1)
    for name, actual in vars(together).items():
        limit = TOLERANCE.get(actual.dtype, 0.0)
        assert oracle.relative_error(actual, getattr(alone, name)) <= limit, name


def test_buffers_outlive_inference_mode_and_a_default_device(monkeypatch):
    monkeypatch.setattr(memory, "_kept", type(memory._kept)())
    monkeypatch.setattr(memory, "_constants", {})
    cpu_sums.plan_of.cache_clear()
    tensors = operands((4, 3, 20, 20), torch.bfloat16, LAYOUTS[0])
    with torch.inference_mode(), torch.device("meta"):
        grad_moments = torch.zeros(6, dtype=torch.float64, device="cpu")
        moments = cpu.moments(tensors[0])
        first = cpu.grad_input(tensors[1], tensors[0], moments, grad_moments, None, 1e-5)
    again = cpu.grad_input(tensors[1], tensors[0], moments.clone(), grad_moments, None, 1e-5)
    assert torch.equal(first, again)


def test_constants_of_all_sizes_share_their_memory(monkeypatch):
    """As a process may meet thousands of geometries, and each has some as long as its maps."""
    monkeypatch.setattr(memory, "_constants", {})
    sizes = [7, *range(1000, 1100)]
    constants = [memory.constant(size, 1.0, torch.float32) for size in sizes]
    assert all(
        torch.equal(each, torch.ones(size)) for each, size in zip(constants, sizes, strict=True)
    )
    assert len({each.data_ptr() for each in constants}) <= 3


@pytest.mark.parametrize("change", [lambda sums: sums.mul_(2.0), lambda sums: sums.data.mul_(2.0)])
def test_moments_may_change_after_they_were_used(change):
    """In place, as an all_reduce does, of which torch takes no notice."""
    input, _, weight, bias = operands((4, 3, 20), torch.float32, LAYOUTS[0])
    moments = cpu.moments(input)
    moments[-1] *= 0.5
    cpu.normalize(input, moments, weight, bias, eps=1e-5)
    change(moments)
    output = cpu.normalize(input, moments, weight, bias, eps=1e-5)
    assert torch.equal(output, cpu.normalize(input, moments.clone(), weight, bias, eps=1e-5))


def test_operators_run_it(plain_torch):
    assert ops._backend("cpu") is cpu


@pytest.mark.parametrize("block", [SMALLEST_BLOCK, memory.BLOCK], ids="blocks of {}".format)
@pytest.mark.parametrize("mean", [0.0, 0.5, 0.9, 1.2, 1.6, 3.0], ids="{} deviations".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_maps_are_as_exact_as_torchs(layout, mean, block, plain_torch, monkeypatch):
    """Of ten draws, as in each one rounding may fall either way."""
    monkeypatch.setattr(memory, "BLOCK", block)
    cpu_layer._ways.cache_clear()
    ours, torchs = ({"output": 0.0, "input": 0.0} for _ in range(2))
    for seed in range(10):
        torch.manual_seed(seed)
        layer = SyncBN(64, eps=blocks.EPS)
        torch.nn.init.normal_(layer.weight, 1.0)
        torch.nn.init.normal_(layer.bias)
        x, dy = (lay_out(2 * (torch.randn(8, 64, 12, 10) + mean), layout) for _ in range(2))
        step = None, x, dy, layer.weight, layer.bias
        exact, eager = blocks.exact(*step), blocks.eager(*step, dtype=torch.float32)
        output = layer(x.requires_grad_())
        output.backward(dy)
        results = {"output": output.detach(), "input": x.grad}
        for name, result in results.items():
            expected = getattr(exact, name)
            ours[name] += oracle.relative_error(result, expected) ** 2
            torchs[name] += oracle.relative_error(getattr(eager, name), expected) ** 2
    for name in ours:
        assert ours[name] <= torchs[name], name


ALONE = [(6, 5, 4, 3), (6, 5, 7), (16, 5), (2, 3, 2, 2, 2), (5, 7, 1, 1), (2, 1, 300, 1)]
SETTINGS = {
    "plain": {},
    "float64 buffers": {"buffers": torch.float64},
    "half precision": {"dtype": torch.bfloat16, "parameters": torch.bfloat16},
    "float64": {"dtype": torch.float64, "parameters": torch.float64, "buffers": torch.float64},
    "no momentum": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
}


def layer_and_operands(shape, layout="channels_first", **settings):
    """A layer of which each parameter and buffer is another number, x and dy."""
    dtypes = {
        name: settings.pop(name, torch.float32) for name in ("dtype", "parameters", "buffers")
    }
    layer = SyncBN(shape[1], **settings).to(dtypes["parameters"])
    for seed, tensor in enumerate(layer.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(random(shape[1:2], torch.float32, "cpu", seed=seed).abs())
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            setattr(layer, name, buffer.to(dtypes["buffers"]))
    x, dy = (random(shape, dtypes["dtype"], "cpu", layout, seed=seed) for seed in (7, 8))
    return layer, x.requires_grad_(), dy


def results_of(layer, x, dy, forward=contextlib.nullcontext, backward=contextlib.nullcontext):
    """Output, gradients and buffers of two training steps, each in a context."""
    for _ in range(2):
        with forward():
            output = layer(x)
        with backward():
            gradients = torch.autograd.grad(output, [x, *layer.parameters()], dy)
    return [output.detach(), *gradients, *layer.buffers()]


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", ALONE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_alone_computes_what_ranks_do(layout, shape, settings, monkeypatch):
    """In one call a pass, or by the steps: float64 both, of which the same roundings are left."""
    results = []
    for largest in (small.LARGEST_IN_ONE_CALL, 0):
        monkeypatch.setattr(small, "LARGEST_IN_ONE_CALL", largest)
        results.append(results_of(*layer_and_operands(shape, layout, **SETTINGS[settings])))
    for actual, expected in zip(*results, strict=True):
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
        limit = TOLERANCE.get(actual.dtype, 0.0)
        assert oracle.relative_error(actual, expected) <= limit


class Operators(TorchDispatchMode):
    """Names of ours that run."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "triton_syncbn":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_backward_that_is_recorded_goes_through_operators(plain_torch):
    """Also if its forward was not recorded, and went another way."""
    names = []
    recorded = results_of(*layer_and_operands((6, 5, 4, 3)), backward=lambda: Operators(names))
    assert [name for name in names if name != "moments"] == ["grad_moments", "grad_input"] * 2
    for actual, expected in zip(
        recorded, results_of(*layer_and_operands((6, 5, 4, 3))), strict=True
    ):
        assert oracle.relative_error(actual, expected) <= TOLERANCE[torch.float32]


def test_hooks_may_copy_what_is_kept_for_backward(plain_torch):
    operands = (6, 5, 4, 3), "channels_last"
    hooks = torch.autograd.graph.saved_tensors_hooks
    copied = results_of(
        *layer_and_operands(*operands), forward=lambda: hooks(torch.clone, lambda kept: kept)
    )
    for actual, expected in zip(copied, results_of(*layer_and_operands(*operands)), strict=True):
        assert torch.equal(actual, expected)


def test_a_second_derivative_of_a_process_alone(plain_torch):
    layer, x, dy = layer_and_operands((6, 5, 4, 3))
    plain = torch.nn.BatchNorm2d(5)
    plain.load_state_dict(layer.state_dict())
    results = []
    for each in (layer, plain):
        (gradient,) = torch.autograd.grad(each(x), x, dy, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), [x, each.weight]))
    for actual, expected in zip(*results, strict=True):
        assert oracle.relative_error(actual, expected) <= SUM_TOLERANCE
