"""Whole models in plain torch, with torch's batch norm layers: what a converter finds in real
networks.

Each is the published architecture at its full width and depth; what a training script would add
(dropout, an auxiliary loss, pretrained weights) is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv_norm(
    inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, weight: float = 1.0
) -> nn.Module:
    """A convolution without a bias, which batch norm would take away again, and the norm, whose
    weights start at `weight`.
    """
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, weight)
    padding = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, norm)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride is in the 3x3.

    The last norm starts at a weight of 0, so that a block begins as its shortcut (Goyal et al.
    2017, section 5.1): else a first step on a small batch multiplies rounding errors 100,000 times.
    """

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = _conv_norm(inputs, width, 1)
        self.spatial = _conv_norm(width, width, 3, stride, dilation)
        self.expand = _conv_norm(width, outputs, 1, weight=0.0)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, H / stride, W / stride)."""
        hidden = F.relu(self.spatial(F.relu(self.reduce(input))))
        return F.relu(self.expand(hidden) + self.shortcut(input))


def _stage(inputs: int, width: int, blocks: int, stride: int, dilation: int = 1) -> nn.Module:
    """Bottlenecks of one width. The first has the stride; a dilation starts behind it."""
    first = Bottleneck(inputs, width, stride, max(1, dilation // 2))
    return nn.Sequential(
        first, *(Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1))
    )


def _backbone(output_stride: int) -> nn.Module:
    """The convolutions of ResNet-50: (N, 3, H, W) to (N, 2048, H / output_stride, ...).

    At an output stride of 8 the last two stages dilate instead of striding.
    """
    dilated = output_stride == 8
    return nn.Sequential(
        _conv_norm(3, 64, 7, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        _stage(64, 64, 3, stride=1),
        _stage(256, 128, 4, stride=2),
        _stage(512, 256, 6, stride=1 if dilated else 2, dilation=2 if dilated else 1),
        _stage(1024, 512, 3, stride=1 if dilated else 2, dilation=4 if dilated else 1),
    )


class ResNet50(nn.Sequential):
    """Image classification (He, Zhang, Ren and Sun 2016), with the stride in the 3x3 convolutions:
    (N, 3, H, W) to logits (N, classes), those of ImageNet.
    """

    def __init__(self, classes: int = 1000) -> None:
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(_backbone(output_stride=32), *pool, nn.Linear(2048, classes))


class DeepLab(nn.Module):
    """Semantic segmentation: DeepLabv3 (Chen, Papandreou, Schroff and Adam 2017) on ResNet-50 at
    output stride 8; the classes are those of PASCAL VOC.
    """

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        self.backbone = _backbone(output_stride=8)
        dilated = (_conv_norm(2048, 256, 3, dilation=rate) for rate in (12, 24, 36))
        self.pyramid = nn.ModuleList([_conv_norm(2048, 256, 1), *dilated])
        self.pooled = _conv_norm(2048, 256, 1)
        self.project = _conv_norm(5 * 256, 256, 1)
        self.refine = _conv_norm(256, 256, 3)
        self.classifier = nn.Conv2d(256, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, classes, H, W)."""
        features = self.backbone(images)
        branches = [F.relu(branch(features)) for branch in self.pyramid]
        pooled = F.relu(self.pooled(features.mean((2, 3), keepdim=True)))
        branches.append(pooled.expand(-1, -1, *features.shape[2:]))
        hidden = F.relu(self.project(torch.cat(branches, dim=1)))
        logits = self.classifier(F.relu(self.refine(hidden)))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


NETWORKS = {"resnet50": ResNet50, "deeplab": DeepLab}
