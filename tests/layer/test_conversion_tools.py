"""Tools that look for batch norm layers see the converted ones; torch.fx takes one for one node."""

import warnings

import pytest
import torch
import torch.nn as nn

from tests.support import subclasses
from triton_syncbn import SyncBN, convert_sync_batchnorm, revert_sync_batchnorm

CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def make_model():
    """Convolutions and batch norm layers of torch and of a subclass, converted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        subclasses.BatchNormDropAct(3),
        nn.Flatten(2),
        nn.BatchNorm1d(3),
        nn.Flatten(),
    )
    for layer in batch_norms(model):
        nn.init.normal_(layer.weight, 1.0)
        nn.init.uniform_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return convert_sync_batchnorm(model)


def make_input():
    return torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, CLASSES)]


def test_every_layer_is_seen(plain_torch):
    """By a list of classes, as validators have it; and by a name, as initializations have it."""
    model = make_model()
    assert len(batch_norms(model)) == 3
    names = [type(layer).__name__ for layer in model.modules()]
    assert sum("BatchNorm" in name for name in names) == 3


def test_a_frozen_layer_counts_no_batch(plain_torch):
    model = make_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for layer in batch_norms(model):
        layer.eval()
        layer.requires_grad_(False)
    model(make_input()).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 4


def test_the_parameters_of_layers_can_be_told_apart(plain_torch):
    """As it is done to keep weight decay from them."""
    model = make_model()
    kept = {
        parameter
        for layer in model.modules()
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        for parameter in layer.parameters(recurse=False)
    }
    assert len(kept) == 6
    assert all(parameter.dim() == 1 for parameter in kept)


def test_precise_statistics(plain_torch):
    """Momentum 1 makes the running statistics those of one batch; their averages are put in."""
    model, batches = make_model(), [make_input() + shift for shift in range(3)]
    twin = revert_sync_batchnorm(make_model())
    for one in (model, twin):
        layers = [layer for layer in batch_norms(one) if layer.training]
        momenta = [layer.momentum for layer in layers]
        means = [torch.zeros_like(layer.running_mean) for layer in layers]
        for layer in layers:
            layer.momentum = 1.0
        for number, batch in enumerate(batches, 1):
            one(batch)
            for layer, mean in zip(layers, means, strict=True):
                mean += (layer.running_mean - mean) / number
        for layer, mean, momentum in zip(layers, means, momenta, strict=True):
            layer.running_mean, layer.momentum = mean, momentum
        assert len(layers) == 3
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


class FrozenBatchNorm(nn.Module):
    """Batch normalization by constants."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach() * (layer.running_var + layer.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", layer.bias.detach() - layer.running_mean * scale)
        self.after = nn.Sequential(*layer.children())

    def forward(self, x):
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        return self.after(x * self.scale.view(per_channel) + self.shift.view(per_channel))


def test_layers_can_be_replaced_by_frozen_ones(plain_torch):
    model = make_model().eval()
    before = model(make_input())
    for name, child in model.named_children():
        if isinstance(child, CLASSES):
            setattr(model, name, FrozenBatchNorm(child))
    assert not batch_norms(model)
    torch.testing.assert_close(model(make_input()), before)


def test_timm_freezes_every_layer(plain_torch):
    timm = pytest.importorskip("timm")
    for name, frozen in (
        ("resnet18", "FrozenBatchNorm2d"),
        ("regnety_002", "FrozenBatchNormAct2d"),
    ):
        model = convert_sync_batchnorm(timm.create_model(name)).eval()
        count = sum(isinstance(layer, SyncBN) for layer in model.modules())
        before = model(torch.ones(1, 3, 64, 64))
        timm.utils.freeze(model)
        kinds = [type(layer).__name__ for layer in model.modules()]
        assert kinds.count(frozen) == count > 0
        torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), before)


@pytest.mark.parametrize("layer_class", [SyncBN, *CLASSES, *subclasses.SYNCHRONIZED])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_is_one_node_of_a_traced_model(layer_class, training, plain_torch):
    model = convert_sync_batchnorm(nn.Sequential(layer_class(3), nn.ReLU())).train(training)
    model[0].register_forward_hook(lambda module, inputs, output: output + 1.0)
    traced = torch.fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in traced.graph.nodes]
    assert nodes[1:-1] == [("call_module", "0"), ("call_module", "1")]
    shape = {nn.BatchNorm1d: (5, 3), nn.BatchNorm3d: (5, 3, 2, 2, 2)}
    input = torch.randn(shape.get(layer_class, (5, 3, 4, 4)))
    assert torch.equal(traced(input), model(input))
    assert traced.get_submodule("0") is model[0]


def test_only_the_layer_itself_says_that_its_module_is_torchs(plain_torch):
    """Its class is found where it is; a reverted layer says what it said before."""
    for layer in (SyncBN(3), convert_sync_batchnorm(nn.BatchNorm2d(3))):
        assert type(layer).__module__.startswith("triton_syncbn.")
    layer = revert_sync_batchnorm(convert_sync_batchnorm(subclasses.BatchNormRelu(3)))
    assert layer.__module__ == subclasses.__name__


def test_convolutions_are_folded_after_a_revert(plain_torch):
    """The folding goes by type(layer), so it passes over converted layers, and changes nothing."""
    from torch.fx.experimental.optimization import fuse

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    convert_sync_batchnorm(model)(make_input())
    expected = model.eval()(make_input())
    passed_over = fuse(model)
    assert len(batch_norms(passed_over)) == 1
    assert torch.equal(passed_over(make_input()), expected)
    folded = fuse(revert_sync_batchnorm(model))
    assert not batch_norms(folded)
    torch.testing.assert_close(folded(make_input()), expected)


def test_training_aware_of_quantization_keeps_the_layers(plain_torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        model = prepare_qat_fx(make_model(), get_default_qat_qconfig_mapping(), (make_input(),))
    assert sum(isinstance(layer, SyncBN) for layer in model.modules()) == 3
    model(make_input()).sum().backward()
    assert [int(layer.num_batches_tracked) for layer in batch_norms(model)] == [1, 1, 1]


def test_torchvision_extracts_features(plain_torch):
    torchvision = pytest.importorskip("torchvision")
    extract = torchvision.models.feature_extraction.create_feature_extractor
    model = convert_sync_batchnorm(torchvision.models.resnet18()).eval()
    names = ["layer1.0.bn1", "layer2.1.bn2", "fc"]
    features = extract(model, names)(torch.ones(1, 3, 64, 64))
    plain = extract(revert_sync_batchnorm(model), names)(torch.ones(1, 3, 64, 64))
    assert list(features) == names
    assert all(torch.equal(features[name], plain[name]) for name in names)
