"""The arms that are compared: how a batch is split over ranks, and which statistics are used."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from segmentation.wrong_layers import AveragedVariances, EquallyWeightedRanks
from triton_syncbn import convert_sync_batchnorm, sync_group

BATCH = 8
REFERENCE = "one process"  # what the other arms are held against

# Gives a network its layers: network, group of the ranks of the arm, pixels of all training images.
Prepare = Callable[[nn.Module, Any, Tensor], nn.Module]


class Arm(NamedTuple):
    """Rank r has shares[r] of the samples of a batch."""

    shares: tuple[int, ...]
    prepare: Prepare
    learning_rate: float = 1.0  # as a share of that of the others
    exact: bool = False  # whether it promises the result of one process


def separate(network: nn.Module, group: Any, pixels: Tensor) -> nn.Module:
    """Each rank normalizes by its own samples, as torch's layer does."""
    return network


def synchronized(network: nn.Module, group: Any, pixels: Tensor) -> nn.Module:
    """All ranks normalize by the whole batch."""
    return convert_sync_batchnorm(network, group)


def synchronized_in_pairs(network: nn.Module, group: Any, pixels: Tensor) -> nn.Module:
    """Ranks 0 and 1 normalize by the samples of both; so do 2 and 3, and so on."""
    return convert_sync_batchnorm(network, sync_group(2))


def fixed(network: nn.Module, group: Any, pixels: Tensor) -> nn.Module:
    """All layers have the statistics of the whole data set, as the initial weights make it, and
    keep them.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0  # those of this one batch
    with torch.no_grad():
        network(pixels)
    convert_sync_batchnorm(network, group)
    for layer in layers:
        layer.freeze()  # type: ignore[operator]
    return network


def replaced_by(layer_class: type[nn.BatchNorm2d]) -> Prepare:
    """Layers of another class, which take the group as an attribute."""

    def prepare(network: nn.Module, group: Any, pixels: Tensor) -> nn.Module:
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = layer_class
                layer.process_group = group
        return network

    return prepare


UNEVEN = (4, 2, 1, 1)
ARMS = {
    REFERENCE: Arm((8,), separate),
    "SyncBN, 2 x 4": Arm((4,) * 2, synchronized, exact=True),
    "SyncBN, 4 x 2": Arm((2,) * 4, synchronized, exact=True),
    "SyncBN, 8 x 1": Arm((1,) * 8, synchronized, exact=True),
    "SyncBN, 4 + 2 + 1 + 1": Arm(UNEVEN, synchronized, exact=True),
    "SyncBN in pairs, 8 x 1": Arm((1,) * 8, synchronized_in_pairs),
    "BatchNorm, 4 x 2": Arm((2,) * 4, separate),
    "BatchNorm, 8 x 1": Arm((1,) * 8, separate),
    "averaged variances, 4 x 2": Arm((2,) * 4, replaced_by(AveragedVariances)),
    "equal ranks, 4 + 2 + 1 + 1": Arm(UNEVEN, replaced_by(EquallyWeightedRanks)),
    "fixed statistics": Arm((8,), fixed),
    "fixed statistics, lr / 10": Arm((8,), fixed, learning_rate=0.1),
}
