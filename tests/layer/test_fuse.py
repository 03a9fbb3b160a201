"""Conversion with fuse=True: layers take on the activation and the add that follow them, and the
model computes what it did, under the same names.
"""

import copy
import logging
import pickle

import pytest
import torch
import torch.fx
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import blocks_to_fuse as blocks
from tests.support import oracle
from triton_syncbn import SyncBN, convert_sync_batchnorm, revert_sync_batchnorm

pytestmark = pytest.mark.usefixtures("plain_torch")

# Of the norm, in float64: a block sums in another order than a layer alone, and tens of layers make
# roundings larger.
TOLERANCE = 1e-10
ELEMENTWISE = {
    *("add", "add_", "relu", "relu_", "threshold_backward", "silu", "silu_", "silu_backward"),
    *("hardtanh", "leaky_relu", "leaky_relu_", "leaky_relu_backward", "mul"),
}


def make(block, dtype=torch.float64):
    torch.manual_seed(0)
    model = block().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def make_input(dtype=torch.float64, side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, blocks.CHANNELS, side, side, dtype=dtype, generator=generator)


def both(block, dtype=torch.float64):
    """A model that is converted, and one that is fused as well."""
    model = make(block, dtype)
    return convert_sync_batchnorm(copy.deepcopy(model)), convert_sync_batchnorm(model, fuse=True)


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SyncBN)}


def fused_layers(model):
    return [name for name, layer in layers(model).items() if layer.fused_activation is not None]


def step(model, x):
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = model(x)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    leaves = [x, *model.parameters()]
    gradients = torch.autograd.grad(output, leaves, dy, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def distance(actual, expected):
    """The largest error of a tensor, of its norm or, where that is near 0, of the largest's."""
    floor = 1e-3 * max(tensor.norm() for tensor in expected[1:])
    return max(
        float((a - e).norm() / max(e.norm(), floor if index else 0.0))
        for index, (a, e) in enumerate(zip(actual, expected, strict=True))
    )


def assert_same(actual, expected):
    assert distance(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("block", blocks.FUSED)
def test_a_fused_model_computes_the_same(block):
    plain, fused = both(block)
    assert len(fused_layers(fused)) == blocks.FUSED[block]
    x = make_input()
    assert_same(step(fused, x), step(plain, x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=TOLERANCE, atol=1e-13)
    plain.eval(), fused.eval()
    assert_same(step(fused, x), step(plain, x))


@pytest.mark.parametrize("block", [blocks.ResNet50Shaped, blocks.EfficientNetShaped])
def test_float32_is_as_near_to_float64_as_unfused(block):
    plain, fused = both(block, torch.float32)
    exact = step(both(block)[0], make_input(torch.float32).double())
    errors = [distance(step(model, make_input(torch.float32)), exact) for model in (fused, plain)]
    assert errors[0] <= 2 * errors[1]  # other roundings, of the same kind


def test_an_add_promotes_as_it_did():
    plain, fused = both(blocks.AllAdds, torch.float32)
    x = make_input(torch.float32)
    assert fused(x).dtype == plain(x).dtype == torch.float64
    # Of the norm: roundings of float32, 1e-7, that some layers make ten times as large.
    assert oracle.relative_error(fused(x), plain(x)) <= 5e-6


@pytest.mark.parametrize("block", blocks.LEFT_ALONE)
def test_what_is_not_proven_is_left_alone_and_says_why(block):
    plain, fused = both(block)
    layer = fused.bn
    assert fused_layers(fused) == []
    assert layer.fusion.startswith("not fused: ")
    assert blocks.LEFT_ALONE[block] in layer.fusion
    assert type(fused) is block
    x = make_input()
    assert_same(step(fused, x), step(plain, x))


class Operators(TorchDispatchMode):
    """Counts operators that pass over activations, element by element."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if (
            function.overloadpacket.__name__ in ELEMENTWISE
            and output.dim() == 4
            and output.shape[3] > 1
        ):
            self.count += 1
        return output


def passes(model):
    """How many passes over activations a model makes in forward and in backward."""
    x = make_input(side=64).requires_grad_()  # no stage has maps of one pixel
    with Operators() as forward:
        output = model(x)
    with Operators() as backward:
        output.square().mean().backward()
    return forward.count, backward.count


@pytest.mark.parametrize(
    ("block", "before", "after"),
    [
        # 49 activations and 16 adds; in backward the adds of a shortcut's two gradients stay
        (blocks.ResNet50Shaped, (65, 65), (0, 16)),
        # eight SiLUs; three products with gates and two adds of shortcuts stay
        (blocks.EfficientNetShaped, (13, 21), (5, 13)),
    ],
)
def test_passes_over_activations(block, before, after):
    plain, fused = both(block)
    assert passes(plain) == before
    assert passes(fused) == after


@pytest.mark.parametrize("block", blocks.FUSED)
def test_names_and_state_stay(block):
    model = make(block)
    names = [name for name, _ in model.named_modules()]
    modules, state = [*model.modules()], model.state_dict()
    parameters = [*model.parameters()]
    convert_sync_batchnorm(model, fuse=True)
    assert [name for name, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model, block)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


@pytest.mark.parametrize("block", blocks.FUSED)
def test_revert_undoes_it(block):
    model, x = make(block), make_input()
    attributes = [(type(module), sorted(vars(module))) for module in model.modules()]
    model.eval()
    expected = model(x)
    convert_sync_batchnorm(model, fuse=True)
    revert_sync_batchnorm(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == attributes
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("twice", [False, True])
def test_conversion_again_changes_nothing(twice):
    _, model = both(blocks.ResNet18Shaped)
    before = {name: (type(layer), layer.fusion) for name, layer in layers(model).items()}
    convert_sync_batchnorm(model, fuse=twice)
    assert {name: (type(layer), layer.fusion) for name, layer in layers(model).items()} == before


def test_a_part_of_what_is_fused_cannot_be_reverted_alone():
    _, model = both(blocks.DoubleConvolution)
    with pytest.raises(ValueError, match=r"module: expected all that is fused .* layer '1'"):
        revert_sync_batchnorm(model[1])
    assert fused_layers(model) == ["1", "4"]


@pytest.mark.parametrize("block", blocks.FUSED)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_is_fused_and_independent(block, duplicate):
    plain, fused = both(block)
    again = duplicate(fused)
    revert_sync_batchnorm(fused)
    assert len(fused_layers(again)) == blocks.FUSED[block]
    x = make_input()
    assert_same(step(again, x), step(plain, x))
    assert len(fused_layers(again)) == blocks.FUSED[block]  # nothing looked changed


@pytest.mark.parametrize(
    "block", [blocks.ResNet18Shaped, blocks.TransformersResNet, blocks.EfficientNetShaped]
)
def test_compiles_to_one_graph(block):
    plain, fused = both(block)
    x = make_input()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same([compiled(x).detach()] * 2, [plain(x).detach()] * 2)
    assert len(fused_layers(fused)) == blocks.FUSED[block]


def test_torch_fx_traces_a_fused_model():
    plain, fused = both(blocks.ResNet18Shaped)
    x = make_input()
    assert_same(step(torch.fx.symbolic_trace(fused), x), step(plain, x))
    assert len(fused_layers(fused)) == blocks.FUSED[blocks.ResNet18Shaped]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    ("hooked", "alone"),
    [
        ("1.layer.1.normalization", {"1.shortcut.normalization"}),
        ("2.layer.1.normalization", {"2.layer.1.normalization"}),
        ("0.activation", {"0.normalization"}),
        ("2.activation", {"2.layer.1.normalization"}),
        ("2.layer", {"2.layer.1.normalization"}),
        ("2", set()),
    ],
)
def test_hooks_prevent_what_they_would_see(hooked, alone, register):
    def run(fuse):
        model, seen = make(blocks.TransformersResNet), []
        hook = lambda _, tensors, *output: seen.append(torch.stack([*output, *tensors][:1]))  # noqa: E731
        getattr(model.get_submodule(hooked), register)(hook)
        convert_sync_batchnorm(model, fuse=fuse)
        model(make_input())
        return model, seen

    model, seen = run(True)
    torch.testing.assert_close(seen, run(False)[1])
    _, all_fused = both(blocks.TransformersResNet)
    assert {*fused_layers(all_fused)} - {*fused_layers(model)} == alone


def change_a_child(block):
    block.relu = nn.SiLU()


def add_a_hook(block):
    block.relu.register_forward_hook(lambda *_: None)


def change_a_setting(block):
    block.downsample = nn.Identity()


@pytest.mark.parametrize("change", [change_a_child, add_a_hook, change_a_setting])
def test_what_changes_later_gives_the_forward_back(change, caplog):
    plain, fused = both(blocks.ResNet18Shaped)
    for model in (plain, fused):
        change(model.stages[3][1])
    x = make_input()
    assert_same(step(fused, x), step(plain, x))
    assert type(fused.stages[3][1]) is blocks.BasicBlock
    assert "no longer fused: stages.3.1.bn" in caplog.text
    assert len(fused_layers(fused)) == blocks.FUSED[blocks.ResNet18Shaped] - 2


def test_layers_run_in_their_order():
    """The order of collectives, in which fused and unfused ranks could meet."""
    orders = []
    for model in both(blocks.ResNet18Shaped):
        order = []
        for name, layer in layers(model).items():
            layer.register_forward_hook(lambda *_, name=name, order=order: order.append(name))
        model(make_input())
        orders.append(order)
    assert orders[0] == orders[1] and len(orders[0]) == 14


def test_all_layers_are_listed(caplog):
    with caplog.at_level(logging.INFO, "triton_syncbn"):
        _, model = both(blocks.ResNet18Shaped)
    assert "11 of 14 layers are fused" in caplog.text
    for name, layer in layers(model).items():
        assert f"{name}: {layer.fusion}" in caplog.text


def test_an_activation_with_two_names_stays():
    activation = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm2d(4), activation, nn.BatchNorm2d(4), nn.Flatten())
    model.append(activation)
    convert_sync_batchnorm(model, fuse=True)
    assert fused_layers(model) == []
    assert "Sequential" in model[0].fusion


def test_repr_says_where_an_activation_is():
    _, model = both(blocks.DoubleConvolution)
    assert "activation=leaky_relu" in repr(model[4])
    assert repr(model[5]) == "FusedLeakyReLU(negative_slope=0.2, in the layer before)"


def test_attributes_of_a_subclass_stay_its_own():
    class Named(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.activation = nn.SiLU()
            self.frozen = nn.Identity()

        def forward(self, x):
            return self.activation(self.frozen(super().forward(x)))

    model, x = Named(blocks.CHANNELS).double(), make_input()
    expected = model(x)
    for fuse, count in ((False, 0), (True, 1)):
        convert_sync_batchnorm(model, fuse=fuse)
        torch.testing.assert_close(model(x), expected)
        assert len(fused_layers(model)) == count
    assert "silu of its own" in model.fusion


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("resnet50", 49), ("resnet18", 17)])
def test_torchvision_resnet(name, count):
    models = pytest.importorskip("torchvision").models
    check_network(models.get_model(name, num_classes=10), count)


@pytest.mark.slow
def test_transformers_resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], return_dict=False
    )
    network = transformers.ResNetForImageClassification(config)
    check_network(network, 13)


def check_network(network, count):
    network.double()
    fused = convert_sync_batchnorm(copy.deepcopy(network), fuse=True)
    plain = convert_sync_batchnorm(network)
    assert len(fused_layers(fused)) == count
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def logits(model):
        output = model(x)
        return output[0] if isinstance(output, tuple) else output

    steps = []
    for model in (fused, plain):
        output = logits(model)
        gradients = torch.autograd.grad(output.square().sum(), [*model.parameters()])
        steps.append([output.detach(), *gradients])
    assert_same(*steps)
