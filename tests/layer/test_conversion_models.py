"""Models of timm, transformers and torchvision, where these are installed: every batch norm layer
is synchronized, and two ranks compute what one process does with the whole batch.
"""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from triton_syncbn import SyncBN, convert_sync_batchnorm, revert_sync_batchnorm

CENSUS = """
    bat_resnext26ts botnet26t_256 coatnet_0_rw_224 convmixer_768_32 cspdarknet53 cspresnet50
    darknet53 densenet121 dla34 dpn68 eca_botnext26ts_256 ecaresnet50t efficientformer_l1
    efficientnet_b0 fastvit_t8 fbnetc_100 gernet_s ghostnet_100 ghostnetv2_100 halonet26t
    hardcorenas_a hgnet_tiny hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4
    lambda_resnet26t lcnet_050 legacy_senet154 legacy_xception levit_128s maxvit_tiny_rw_224
    mixnet_s mnasnet_100 mobilenetv2_100 mobilenetv3_large_100 mobilenetv3_small_050
    mobilenetv4_conv_small mobileone_s0 mobilevit_xxs regnetx_002 regnety_002 repghostnet_050
    repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet18 resnet50 resnext50_32x4d rexnet_100
    selecsls42b seresnet50 shvit_s1 skresnet18 starnet_s1 tf_efficientnetv2_s tiny_vit_5m_224
    tinynet_e tresnet_m vgg11_bn visformer_tiny vovnet39a wide_resnet50_2 xception41
""".split()  # noqa: SIM905
SIZES = (3, 2)
SIDE = 64


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def synchronized_and_named(model):
    """How many batch norm layers a model has, how many of them a conversion synchronizes, and how
    many it names in a warning.
    """
    layers = batch_norms(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_sync_batchnorm(model)
    named = ["is left unsynchronized: " in str(warning.message) for warning in caught]
    return len(layers), sum(isinstance(layer, SyncBN) for layer in layers), sum(named)


def test_every_batch_norm_of_timm_is_synchronized():
    timm = pytest.importorskip("timm")
    found = {}
    for name in CENSUS:
        with torch.device("meta"):
            found[name] = synchronized_and_named(timm.create_model(name))
    print(*(f"{name}: {counts}" for name, counts in found.items()), sep="\n")
    layers, synchronized, named = map(sum, zip(*found.values(), strict=True))
    assert all(count > 0 for count, *_ in found.values())
    assert len(found) >= 40
    assert synchronized + named == layers
    assert synchronized >= 0.99 * layers


def test_what_timm_has_synchronized_itself_is_converted():
    timm = pytest.importorskip("timm")
    model = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_b0"))
    kinds = {type(layer).__name__ for layer in batch_norms(model)}
    assert kinds == {"SyncBatchNormAct"}
    assert synchronized_and_named(model) == (49, 49, 0)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())
    revert_sync_batchnorm(model)
    assert {type(layer) for layer in batch_norms(model)} == {timm.layers.SyncBatchNormAct}


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018) on a small MobileNetV2: atrous pyramid, decoder with a skip."""

    def __init__(self, classes=5, width=16):
        super().__init__()
        from torchvision.models import mobilenet_v2
        from torchvision.ops import Conv2dNormActivation

        features = mobilenet_v2(width_mult=0.25).features
        self.low, self.high = features[:4], features[4:14]
        low, high = self.low[-1].out_channels, self.high[-1].out_channels
        self.pyramid = nn.ModuleList(
            Conv2dNormActivation(high, width, 3 if rate > 1 else 1, dilation=rate)
            for rate in (1, 2, 4)
        )
        self.whole = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(high, width, kernel_size=1)
        )
        self.project = Conv2dNormActivation(4 * width, width, kernel_size=1)
        self.skip = Conv2dNormActivation(low, width, kernel_size=1)
        self.decoder = nn.Sequential(
            Conv2dNormActivation(2 * width, width), nn.Conv2d(width, classes, 1)
        )

    def forward(self, images):
        low = self.low(images)
        high = self.high(low)
        whole = self.whole(high).expand(-1, -1, *high.shape[2:])
        high = self.project(torch.cat([*(branch(high) for branch in self.pyramid), whole], 1))
        high = F.interpolate(high, low.shape[2:], mode="bilinear")
        logits = self.decoder(torch.cat([high, self.skip(low)], 1))
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def transformers_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2])
    return ResNetForImageClassification(config)


def of_timm(name):
    import timm

    return timm.create_model(name, num_classes=10)


MODELS = {
    **{
        name: ("timm", of_timm, name)
        for name in (
            *("densenet121", "efficientnet_b0", "hrnet_w18_small", "mobilenetv3_small_050"),
            *("regnety_002", "resnet18"),
        )
    },
    "transformers' ResNet": ("transformers", transformers_resnet),
    "MobileNetV2-DeepLabV3+": ("torchvision", DeepLabV3Plus),
}


def make_model(name):
    """In float64, with weights of batch norm layers that differ, and without what is random."""
    torch.manual_seed(0)
    _, make, *arguments = MODELS[name]
    model = make(*arguments).double()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.1)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = 0.0
    return model


def make_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SIZES), 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def logits_of(model, images):
    output = model(images)
    return getattr(output, "logits", output)


def train_one_step(model, images):
    """Logits, and the gradients of images and parameters; then the buffers."""
    images = images.clone().requires_grad_()
    logits = logits_of(model.train(), images)
    logits.square().sum().backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), images.grad, gradients, dict(model.named_buffers())


def step_of_a_rank(rank, world_size, name):
    model = make_model(name)
    count, synchronized, _ = synchronized_and_named(model)
    assert count == synchronized > 0
    return train_one_step(model, make_images().split(SIZES)[rank])


def assert_within(actual, expected, what):
    """1e-9 of the largest value, and of 1 where all are small."""
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert error <= 1e-9, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_does_with_the_whole_batch(name, reference_ranks):
    pytest.importorskip(MODELS[name][0])
    ranks = reference_ranks.run(step_of_a_rank, len(SIZES), name)
    logits, grad_images, gradients, buffers = train_one_step(make_model(name), make_images())
    assert_within(torch.cat([results[0] for results in ranks]), logits, "logits")
    assert_within(torch.cat([results[1] for results in ranks]), grad_images, "gradient of images")
    for parameter, gradient in gradients.items():
        assert_within(sum(results[2][parameter] for results in ranks), gradient, parameter)
    for buffer, value in buffers.items():
        for results in ranks:
            assert_within(results[3][buffer].double(), value.double(), buffer)


@pytest.mark.parametrize("name", MODELS)
def test_eval_gives_the_same_bits_before_and_after(name, plain_torch):
    """Before a conversion, with it, and after it is reverted."""
    pytest.importorskip(MODELS[name][0])
    model, images = make_model(name), make_images()
    train_one_step(model, images)
    classes = [type(layer) for layer in model.modules()]
    with torch.no_grad():
        before = logits_of(model.eval(), images)
        assert torch.equal(logits_of(convert_sync_batchnorm(model), images), before)
        duplicate = copy.deepcopy(model)
        assert torch.equal(logits_of(duplicate, images), before)
        assert torch.equal(logits_of(revert_sync_batchnorm(model), images), before)
    assert [type(layer) for layer in model.modules()] == classes
