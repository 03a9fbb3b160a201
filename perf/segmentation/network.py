"""A compact encoder and decoder with eight batch norm layers."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from segmentation.data import CLASSES


def _block(channels: int, output_channels: int, stride: int = 1) -> nn.Sequential:
    # A smooth activation: where an argument of ReLU falls on the other side of 0 by its last digit,
    # a gradient jumps, and rounding grows into another training.
    convolution = nn.Conv2d(channels, output_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(output_channels), nn.SiLU())


def _stage(channels: int, output_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _block(channels, output_channels, stride), _block(output_channels, output_channels)
    )


class Network(nn.Module):
    """Logits [N, CLASSES, H, W] of pixels [N, 3, H, W], for H and W that are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.encode_full = _stage(3, 16, stride=1)
        self.encode_half = _stage(16, 32, stride=2)
        self.encode_quarter = _stage(32, 64, stride=2)
        self.decode_half = _block(64 + 32, 32)
        self.decode_full = _block(32 + 16, 16)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Each stage of the decoder gets what is below it, enlarged, and what its twin has made."""
        full = self.encode_full(pixels)
        half = self.encode_half(full)
        below = F.interpolate(self.encode_quarter(half), scale_factor=2.0)
        below = self.decode_half(torch.cat([below, half], 1))
        below = F.interpolate(below, scale_factor=2.0)
        return self.head(self.decode_full(torch.cat([below, full], 1)))
