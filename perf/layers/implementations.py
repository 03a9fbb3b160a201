"""What is compared. A new variant is one more entry of IMPLEMENTATIONS: the class of a layer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNormFunction

import triton_syncbn
from layers.gather_syncbn import GatherSyncBN
from layers.handwritten_syncbn import HandwrittenSyncBN
from triton_syncbn import functional
from triton_syncbn.conversion.convert import BatchNorm

BOUND = "torch_batchnorm"
OURS = "triton_syncbn"


class SynchronizedTorchSyncBatchNorm(torch.nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that synchronizes also where there is one rank; the original is then a
    plain batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As the original does for several ranks."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return TorchSyncBatchNormFunction.apply(
            *(input, self.weight, self.bias, self.running_mean, self.running_var),
            *(self.eps, self.momentum, dist.group.WORLD, dist.get_world_size()),
        )


class Implementation(NamedTuple):
    """A class of layers, and what has to be known to compare it."""

    layer_class: Callable[[int], Any]
    note: str  # for the reader of a report
    devices: tuple[str, ...] = ("cuda", "cpu")
    synchronized: bool = True
    compiled: bool = False  # where it cannot be, a line says why and its rows are left out


IMPLEMENTATIONS = {
    BOUND: Implementation(
        BatchNorm, "torch's batch norm, which does not synchronize: the bound", synchronized=False
    ),
    "torch_syncbn": Implementation(
        SynchronizedTorchSyncBatchNorm,
        "torch.nn.SyncBatchNorm, its synchronized path also where there is one rank, where torch "
        "leaves it out",
        devices=("cuda",),
    ),
    "handwritten_syncbn": Implementation(
        HandwrittenSyncBN,
        "what is written by hand where torch.nn.SyncBatchNorm refuses CPU tensors: autograd "
        "through one all_reduce",
        devices=("cpu",),
    ),
    "gather_syncbn": Implementation(
        GatherSyncBN,
        "sends what torch.nn.SyncBatchNorm would send, and computes as triton_syncbn does",
        devices=("cpu",),
    ),
    OURS: Implementation(triton_syncbn.SyncBN, "ours; on a CPU in torch's operators"),
    f"{OURS}_compiled": Implementation(
        triton_syncbn.SyncBN, "ours under torch.compile", devices=("cuda",), compiled=True
    ),
}


def implementations(device: torch.device) -> dict[str, Implementation]:
    """Those that a device has, in the order of IMPLEMENTATIONS."""
    return {name: found for name, found in IMPLEMENTATIONS.items() if device.type in found.devices}


@contextlib.contextmanager
def synchronized_even_alone() -> Iterator[None]:
    """Make SyncBN communicate in training also in a group of one rank, where it has no need to."""
    original = functional._group_to_synchronize

    def whole_world(process_group: Any) -> Any:
        return dist.group.WORLD

    functional._group_to_synchronize = whole_world
    try:
        yield
    finally:
        functional._group_to_synchronize = original
