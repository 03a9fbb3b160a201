"""SyncBN with an activation, a residual, or fixed statistics."""

import itertools
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.support import blocks, oracle
from tests.support.blocks import EPS, SLOPE
from tests.support.inputs import LAYOUTS, lay_out
from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, sync_batch_norm
from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.cpu import blocks as cpu_blocks

SHAPE = (6, 16, 5, 7)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMBINATIONS = list(itertools.product(blocks.ACTIVATIONS, [False, True], LAYOUTS, DTYPES))
STEP = [
    ("all_reduce", (2 * SHAPE[1] + 1,), torch.float64),
    ("all_reduce", (2 * SHAPE[1],), torch.float64),
]


def make_layer(activation, channels=SHAPE[1], **options):
    torch.manual_seed(1)
    layer = SyncBN(
        channels,
        eps=EPS,
        activation=activation,
        activation_slope=SLOPE,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for parameter, fill in ((layer.weight, nn.init.uniform_), (layer.bias, nn.init.normal_)):
            if parameter is not None:
                fill(parameter, 0.5, 2.0)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer


def make_tensors(dtype, layout, residual, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        lay_out((2 * torch.randn(shape, generator=generator) + 1).to(dtype), layout)
        for _ in range(3)
    ]
    return tensors if residual else [*tensors[:2], None]


def gradients(layer, x, dy, residual, **how):
    """y and the gradients of input, weight, bias and residual."""
    leaves = {"input": x.requires_grad_(), "weight": layer.weight, "bias": layer.bias}
    if residual is not None:
        leaves["residual"] = residual.requires_grad_()
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    output = layer(x, residual)
    grads = torch.autograd.grad(output, leaves.values(), dy, **how)
    nothing = dict.fromkeys(blocks.Gradients._fields)
    return blocks.Gradients(
        **{**nothing, "output": output.detach(), **dict(zip(leaves, grads, strict=True))}
    )


def train_blocks(rank, world_size):
    """Of each combination: what this rank's samples give, plainly and for a second derivative, and
    the collectives of the plain step.
    """
    share = slice(4 * rank, 4 * rank + 4 if world_size > 1 else None)  # all samples, or 4 and 2
    results = []
    for activation, residual, layout, dtype in COMBINATIONS:
        tensors = make_tensors(dtype, layout, residual)
        parts = [tensor if tensor is None else tensor[share] for tensor in tensors]
        with counted_communication() as calls:
            plain = gradients(make_layer(activation), *parts)
        twice = gradients(make_layer(activation), *parts, create_graph=True)
        results.append(
            [*([v if v is None else v.detach() for v in r] for r in (plain, twice)), calls]
        )
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_block_is_one_of_the_whole_batch(world_size, reference_ranks):
    ranks = reference_ranks.run(train_blocks, world_size)
    for combination, *of_ranks in zip(COMBINATIONS, *ranks, strict=True):
        activation, residual, layout, dtype = combination
        layer = make_layer(activation)
        x, dy, extra = make_tensors(dtype, layout, residual)
        whole = activation, x, dy, layer.weight, layer.bias, extra
        exact, torchs = blocks.exact(*whole), blocks.eager(*whole, dtype=torch.float32)
        for plain_or_twice in (0, 1):
            output, *grads = zip(*(results[plain_or_twice] for results in of_ranks), strict=True)
            maps = [None if parts[0] is None else torch.cat(parts) for parts in (output, *grads)]
            maps[2:4] = sum(grads[1]), sum(grads[2])
            wrong = blocks.faults(blocks.Gradients(*maps), exact, dtype, torchs)
            assert not wrong, (combination, plain_or_twice, wrong)
        for _, _, calls in of_ranks:
            assert calls == (STEP if world_size > 1 else []), combination


# Shapes and how many of each: small ones; ones whose maps are cut into pieces, of samples, of rows
# and, in a large sample, of channels; and few channels, where a mean is in every error.
DRAWN = {(6, 16, 5, 7): 20, (5, 12, 24, 24): 2, (1, 8, 64, 48): 2, (8, 2, 64, 64): 2}
PIECE = 1 << 13  # elements, which cut some of those


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_float32_map_is_further_from_right_than_torchs(
    activation, layout, residual, monkeypatch
):
    """In any draw: not by the norm of its error, and not by the largest."""
    monkeypatch.setattr(cpu_blocks, "PIECE", PIECE)
    monkeypatch.setattr(cpu_blocks, "LEAST_OF_THREAD", 0)
    for shape, draws in DRAWN.items():
        layer = make_layer(activation, shape[1])
        for seed in range(draws):
            x, dy, extra = make_tensors(torch.float32, layout, residual, shape, seed)
            whole = activation, x, dy, layer.weight, layer.bias, extra
            exact, torchs = blocks.exact(*whole), blocks.eager(*whole, dtype=torch.float32)
            ours = gradients(layer, x, dy, extra)
            for name in ("output", "input", "residual") if residual else ("output", "input"):
                right = getattr(exact, name)
                mine, theirs = ((getattr(r, name) - right).abs() for r in (ours, torchs))
                assert mine.norm() <= theirs.norm(), (shape, seed, name)
                assert mine.max() <= theirs.max(), (shape, seed, name)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_a_frozen_block_is_exact(activation, dtype, layout, residual):
    layer = make_layer(activation).freeze()
    statistics = layer.running_mean.clone(), layer.running_var.clone()
    x, dy, extra = make_tensors(dtype, layout, residual)
    exact = blocks.exact(activation, x, dy, layer.weight, layer.bias, extra, statistics=statistics)
    actual = gradients(layer, x, dy, extra)
    assert not blocks.faults(actual, exact, dtype)
    assert actual.output.stride() == actual.input.stride() == x.stride()
    assert not blocks.faults(gradients(layer, x, dy, extra, create_graph=True), exact, dtype)
    assert torch.equal(layer.running_mean, statistics[0])
    assert layer.num_batches_tracked.item() == 0


MIXED = {
    "no bias": {"bias": False},
    "no weight, no bias": {"affine": False},
    "a large mean": {"mean": 1e4, "dtype": torch.float32},
    "a residual of float32": {"residual_dtype": torch.float32},
    "a residual of float64": {"residual_dtype": torch.float64, "dtype": torch.float32},
    "a residual in another layout": {"residual_layout": "channels_last"},
    "strides": {"strided": True},
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("case", MIXED)
def test_a_block_of_what_does_not_match_is_exact(case, activation, residual):
    options = dict(MIXED[case])
    mean, dtype = options.pop("mean", 0.0), options.pop("dtype", torch.bfloat16)
    residual_dtype = options.pop("residual_dtype", dtype)
    residual_layout = options.pop("residual_layout", None)
    strided = options.pop("strided", False)
    layer = make_layer(activation, 3, **options)
    x, dy, extra = make_tensors(torch.float64, "channels_first", residual, (4, 3, 3, 5))
    x, dy = (x + mean).to(dtype), dy.to(dtype)
    if residual:
        extra = extra.to(residual_dtype)
        if residual_layout is not None:
            extra = lay_out(extra, residual_layout)
    if strided:
        x, dy, extra = (t if t is None else torch.stack([t, t], -1)[..., 0] for t in (x, dy, extra))
    # a residual, and its gradient, are rounded to the dtype of the input
    rounded = None if extra is None else extra.to(dtype)
    exact = blocks.exact(activation, x, dy, layer.weight, layer.bias, rounded)
    actual = gradients(layer, x, dy, extra)
    assert actual.output.dtype == dtype
    if residual:
        assert actual.residual.dtype == residual_dtype
        actual = actual._replace(residual=actual.residual.to(dtype))
    assert not blocks.faults(actual, exact, dtype)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_first_and_second_derivatives_of_a_block(activation, residual):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2, 2), (2,), (2,), *([(3, 2, 2)] if residual else []))
    ]

    def block(x, weight, bias, extra=None):
        return sync_batch_norm(
            *(x, None, None, weight, bias, True),
            residual=extra,
            activation=activation,
            activation_slope=SLOPE,
        )

    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(block, leaves)


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
    z = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=EPS)
    z += extra
    assert oracle.relative_error(layer(x, extra), blocks.ACTIVATIONS[activation](z)) <= 1e-14


# Where an activation or its derivative jumps or bends.
KINKS = torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 1.0, -1.0], dtype=torch.float64)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_the_gradient_at_a_kink_is_torchs(activation, residual):
    """A weight of 0 makes every element of a channel its bias, or what a residual makes of it."""
    channels = len(KINKS)
    layer = SyncBN(
        channels, activation=activation, activation_slope=SLOPE, affine=not residual
    ).double()
    x, dy, _ = make_tensors(torch.float64, "channels_first", False, (2, channels, 3))
    if not residual:
        layer.load_state_dict(
            {**layer.state_dict(), "weight": torch.zeros(channels), "bias": KINKS}
        )
    else:  # equal values: x - mean is 0
        x = torch.ones_like(x)
    extra = KINKS.view(-1, 1).expand(x.shape).contiguous() if residual else None
    weight, bias = (torch.zeros_like(KINKS), KINKS) if not residual else (None, None)
    exact = blocks.exact(activation, x, dy, weight, bias, extra)
    actual = gradients(layer, x, dy, extra)
    torch.testing.assert_close(actual.output, exact.output)
    if residual:
        torch.testing.assert_close(actual.residual, exact.residual)
    else:
        torch.testing.assert_close(actual.bias, exact.bias)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_nan_passes_as_in_torch(activation):
    """From the residual into one element of y, from the input into its channel, and no further."""
    layer = make_layer(activation, 4)
    x, dy, extra = make_tensors(torch.float64, "channels_first", True, (3, 4, 5))
    extra[0, 1, 0] = x[1, 3, 2] = torch.nan
    exact = blocks.exact(activation, x, dy, layer.weight, layer.bias, extra)
    actual = gradients(layer, x, dy, extra)
    torch.testing.assert_close(actual.output, exact.output, equal_nan=True)
    assert actual.output[:, 1].isnan().sum() == 1 and actual.output[:, 3].isnan().all()
    for name in ("input", "residual"):
        clean = (getattr(result, name)[:, ::2] for result in (actual, exact))
        torch.testing.assert_close(*clean)


# As torch has it on a GPU, but that a NaN passes a hardswish there. On a CPU its loops differ in
# relu6, elu and hardswish from that, and from their own last elements.
DERIVATIVE_AT_NAN = {
    None: 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "leaky_relu": SLOPE,
    "elu": 1.0,
    "silu": torch.nan,
    "gelu": torch.nan,
    "hardswish": torch.nan,
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
def test_the_derivative_at_nan(activation, dtype):
    """In vectors and in what is left over at their end: a NaN of the residual, which its own
    gradient shows, and a channel of them, which the gradient of the bias shows.
    """
    expected = DERIVATIVE_AT_NAN[activation]
    x, dy, extra = make_tensors(dtype, "channels_first", True, (3, 8, 7))
    extra[:, 1] = extra[2, 7, 6] = torch.nan
    of_residual = gradients(make_layer(activation, 8), x.clone(), dy, extra).residual
    wanted = (expected * dy.double()).to(dtype)
    for place in ((slice(None), 1), (2, 7, 6)):
        torch.testing.assert_close(of_residual[place], wanted[place], equal_nan=True)
    x[1, 3, 2] = torch.nan
    of_bias = gradients(make_layer(activation, 8), x, dy, None).bias
    wanted = expected * dy[:, 3].double().sum()
    torch.testing.assert_close(of_bias[3], wanted, equal_nan=True)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    ("activation", "residual", "dtype", "maps"),
    [
        ("relu", False, torch.bfloat16, 1),  # x; the ReLU of torch in place keeps y, too
        ("silu", False, torch.bfloat16, 1),
        (None, True, torch.bfloat16, 1),
        ("relu", True, torch.bfloat16, 1 + 1 / 16),  # x and a bit per element
        ("relu", True, torch.float32, 1 + 1 / 32),
        ("silu", True, torch.bfloat16, 2),  # x and the residual, where torch keeps x and the sum
    ],
)
def test_what_a_block_keeps_for_backward(activation, residual, dtype, maps):
    x, _, extra = make_tensors(dtype, "channels_first", residual)
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
