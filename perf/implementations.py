"""What is compared: a name, and how to make the layer. A new variant is one more line in the table
at the end.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from gather_syncbn import GatherSyncBN
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNormFunction
from torch.nn.modules.batchnorm import _BatchNorm

import triton_syncbn
from triton_syncbn import functional
from triton_syncbn.convert import BatchNorm

OURS = "triton_syncbn"


class SynchronizedTorchSyncBatchNorm(torch.nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that synchronizes also where there is one rank; the original is then a
    plain batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As the original does for several ranks."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return TorchSyncBatchNormFunction.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            dist.group.WORLD,
            dist.get_world_size(),
        )


@contextlib.contextmanager
def synchronized_even_alone() -> Iterator[None]:
    """Make SyncBN communicate in training also in a group of one rank, where it has no need to."""
    original = functional._group_to_synchronize

    def whole_world(process_group: Any, training: bool, device: torch.device) -> Any:
        return dist.group.WORLD if training else None

    functional._group_to_synchronize = whole_world
    try:
        yield
    finally:
        functional._group_to_synchronize = original


def implementations(device: torch.device) -> dict[str, Callable[[int], _BatchNorm]]:
    """For each name, a function from the number of channels to a layer; the first is what ours is
    held against.
    """
    if device.type == "cuda":
        table: dict[str, Callable[[int], _BatchNorm]] = {
            "torch_syncbn": SynchronizedTorchSyncBatchNorm
        }
    else:
        table = {"gather_syncbn": GatherSyncBN}
    return {**table, "torch_batchnorm": BatchNorm, OURS: triton_syncbn.SyncBN}
