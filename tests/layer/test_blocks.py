"""SyncBN with an activation, a residual, or fixed statistics."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.support import blocks, oracle
from tests.support.blocks import SLOPE
from tests.support.inputs import LAYOUTS, lay_out
from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, sync_batch_norm
from triton_syncbn.activations import ACTIVATIONS

SHAPE = (6, 16, 5, 7)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Of the norm: float32 has some roundings, of sums that cancel too; bfloat16 one.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def make_layer(activation):
    torch.manual_seed(1)
    layer = SyncBN(SHAPE[1], activation=activation, activation_slope=SLOPE, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer


def make_tensors(dtype, layout, residual):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        lay_out((2 * torch.randn(SHAPE, generator=generator) + 1).to(dtype), layout)
        for _ in range(3)
    ]
    return tensors if residual else [*tensors[:2], None]


def gradients(layer, x, dy, residual, **how):
    """y and the gradients of input, weight, bias and residual."""
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    if residual is not None:
        leaves.append(residual.requires_grad_())
    output = layer(x, residual)
    grads = torch.autograd.grad(output, leaves, dy, **how)
    return blocks.Gradients(output, *grads, *[None] * (4 - len(grads)))


def assert_near(actual, exact, tolerance):
    for name, value in actual._asdict().items():
        if value is not None:
            error = oracle.relative_error(value.detach(), getattr(exact, name).detach())
            assert error <= tolerance, f"{name}: {error}"


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_a_block_is_exact(activation, dtype, layout, residual, frozen):
    layer = make_layer(activation)
    statistics = None
    if frozen:
        layer.freeze()
        statistics = layer.running_mean.clone(), layer.running_var.clone()
    x, dy, extra = make_tensors(dtype, layout, residual)
    exact = blocks.exact(activation, x, dy, layer.weight, layer.bias, extra, statistics)
    actual = gradients(layer, x, dy, extra, retain_graph=True)
    assert_near(actual, exact, TOLERANCE[dtype])
    assert actual.output.stride() == actual.input.stride() == x.stride()
    assert_near(gradients(layer, x, dy, extra, create_graph=True), exact, TOLERANCE[dtype])
    if frozen:
        assert torch.equal(layer.running_mean, statistics[0])
        assert layer.num_batches_tracked.item() == 0


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_second_derivatives_of_a_block(activation, residual):
    layer = make_layer(activation)
    x, dy, extra = make_tensors(torch.float64, "channels_first", residual)
    leaves = [tensor for tensor in (x, extra) if tensor is not None]

    def block(*tensors):
        return layer(*tensors)

    def penalty(function):
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
        squares = sum(grad.square().sum() for grad in first)
        return torch.autograd.grad(squares, inputs, materialize_grads=True)

    def exact(x, extra=0.0):
        z = F.batch_norm(x, None, None, layer.weight, layer.bias, True)
        return blocks.ACTIVATIONS[activation](z + extra)

    for actual, expected in zip(penalty(block), penalty(exact), strict=True):
        assert oracle.relative_error(actual, expected) <= 1e-11


def train_block(rank, world_size, activation, residual):
    """Gradients of this rank's samples, and the collectives of the step."""
    layer = make_layer(activation)
    x, dy, extra = make_tensors(torch.float64, "channels_first", residual)
    mine = slice(rank * 4, rank * 4 + 4)  # 4 samples and 2
    parts = [None if tensor is None else tensor[mine] for tensor in (x, dy, extra)]
    with counted_communication() as calls:
        result = gradients(layer, *parts)
    return [None if value is None else value.detach() for value in result], calls


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_block_over_ranks_is_one_of_the_whole_batch(activation, residual, ranks):
    results = ranks.run(train_block, 2, activation, residual)
    layer = make_layer(activation)
    x, dy, extra = make_tensors(torch.float64, "channels_first", residual)
    exact = blocks.exact(activation, x, dy, layer.weight, layer.bias, extra)
    outputs, inputs, weights, biases, residuals = zip(
        *(result for result, _ in results), strict=True
    )
    assert oracle.relative_error(torch.cat(outputs), exact.output) <= 1e-12
    assert oracle.relative_error(torch.cat(inputs), exact.input) <= 1e-12
    assert oracle.relative_error(sum(weights), exact.weight) <= 1e-12
    assert oracle.relative_error(sum(biases), exact.bias) <= 1e-12
    if residual:
        assert oracle.relative_error(torch.cat(residuals), exact.residual) <= 1e-12
    channels = SHAPE[1]
    for _, calls in results:
        assert [(name, shape) for name, shape, _ in calls] == [
            ("all_reduce", (2 * channels + 1,)),
            ("all_reduce", (2 * channels,)),
        ]


def frozen_step(rank, world_size):
    layer = make_layer("relu").freeze()
    x, dy, extra = make_tensors(torch.float32, "channels_first", True)
    with counted_communication() as calls:
        gradients(layer, x, dy, extra)
    return calls


def test_a_frozen_layer_communicates_nothing(reference_ranks):
    assert reference_ranks.run(frozen_step, 2) == [[], []]


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_eval_of_a_block_is_that_of_its_parts(activation):
    layer = make_layer(activation).eval()
    x, _, extra = make_tensors(torch.float64, "channels_first", True)
    z = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias) + extra
    assert oracle.relative_error(layer(x, extra), blocks.ACTIVATIONS[activation](z)) <= 1e-14


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_the_gradient_of_relu_at_zero_is_zero_and_nan_passes(residual):
    layer = SyncBN(3, activation="relu")
    torch.nn.init.zeros_(layer.weight)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    extra = torch.zeros_like(x) if residual else None
    layer(x, extra).sum().backward()
    assert torch.equal(layer.bias.grad, torch.zeros(3))
    with torch.no_grad():
        x[0, 1] = float("nan")
    output = layer(x, extra)
    assert output[:, 1].isnan().all()
    assert not output[:, ::2].isnan().any()


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    ("activation", "residual", "maps"),
    [
        ("relu", False, 1),  # x; the ReLU of torch in place keeps y, too
        ("silu", False, 1),
        (None, True, 1),
        ("relu", True, 1 + 1 / 16),  # x and a bit per element
        ("silu", True, 2),  # x and the residual, where torch keeps x and the sum
    ],
)
def test_what_a_block_keeps_for_backward(activation, residual, maps):
    x, _, extra = make_tensors(torch.bfloat16, "channels_first", residual)
    x.requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_layer(activation)(x, extra)
    channels = 8 * (2 * SHAPE[1] + 1) + 2 * 8 * SHAPE[1]  # sums, weight and bias
    assert sum(kept.values()) <= maps * x.numel() * x.itemsize + channels


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_a_block_keeps_no_more_than_torch_in_place(activation, residual):
    """Torch keeps x and what an activation in place or a sum leaves: of ReLU y, of SiLU z."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    totals = []
    for fused in (True, False):
        kept.clear()
        x, _, extra = make_tensors(torch.bfloat16, "channels_first", residual)
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if fused:
                output = make_layer(activation)(x, extra)
            else:
                z = make_layer(None)(x)
                z = z if extra is None else z.add_(extra)
                if activation in ("relu", "relu6", "leaky_relu", "elu", "silu", "hardswish"):
                    slope = (SLOPE,) if activation == "leaky_relu" else ()
                    output = getattr(F, activation)(z, *slope, inplace=True)
                else:
                    output = blocks.ACTIVATIONS[activation](z)
        totals.append(sum(kept.values()))
        del output
    small = 2 * 8 * SHAPE[1]  # the bias
    assert totals[0] <= totals[1] + small
    if residual and activation in ("relu", "relu6", "leaky_relu"):
        assert totals[0] < 0.6 * totals[1]


@pytest.mark.slow
@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("tracks", [False, True], ids=["no statistics", "statistics"])
def test_a_block_compiles_to_one_graph(activation, residual, tracks):
    torch._dynamo.reset()
    layer = SyncBN(SHAPE[1], activation=activation, track_running_stats=tracks)
    x, dy, extra = make_tensors(torch.float32, "channels_first", residual)
    eager = gradients(layer, x, dy, extra)
    compiled = torch.compile(layer, fullgraph=True)
    compiled.weight, compiled.bias = layer.weight, layer.bias
    for actual, expected in zip(gradients(compiled, x, dy, extra), eager, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


@pytest.mark.usefixtures("plain_torch")
def test_a_frozen_layer_can_be_thawed_copied_and_printed():
    layer = make_layer("relu").freeze()
    assert "activation=relu, frozen" in repr(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert again.frozen_statistics and again.fused_activation == "relu"
    x, *_ = make_tensors(torch.float64, "channels_first", False)
    layer.unfreeze()(x)
    assert layer.num_batches_tracked.item() == 1
    with pytest.raises(ValueError, match="track_running_stats: expected a layer with running"):
        SyncBN(3, track_running_stats=False).freeze()


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation: expected None or one of relu, relu6"),
        ({"residual": 1.0}, TypeError, "residual: expected a torch.Tensor or None, got float"),
        ({"residual": torch.zeros(4, 3, 2)}, ValueError, "residual: expected shape"),
        ({"residual": torch.zeros(4, 3).long()}, TypeError, "residual: expected float16"),
    ],
)
def test_what_is_no_block_is_an_error(wrong, error, message):
    with pytest.raises(error, match=message):
        sync_batch_norm(torch.randn(4, 3), None, None, training=True, **wrong)


def test_every_activation_has_a_test():
    assert set(blocks.ACTIVATIONS) == {None, *ACTIVATIONS}
