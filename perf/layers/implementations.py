"""What is compared. A new variant is one more decorated function, from the number of channels to a
layer. The first that a device has is what ours is held against.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNormFunction

import triton_syncbn
from layers.gather_syncbn import GatherSyncBN
from triton_syncbn import functional
from triton_syncbn.conversion.convert import BatchNorm

OURS = "triton_syncbn"

Make = Callable[[int], torch.nn.Module]


class Implementation(NamedTuple):
    """How to make a layer, and what has to be known to compare it."""

    make: Make
    devices: tuple[str, ...] = ("cuda", "cpu")
    only_if_chosen: tuple[str, ...] = ()  # devices where --impl has to name it
    synchronized: bool = True
    in_place: bool = False  # it overwrites its input
    needs: str | None = None  # the package that it comes from
    may_fail: bool = False  # where it cannot run, a line says why and its rows are left out


REGISTERED: dict[str, Implementation] = {}


def implementation(name: str, **traits: Any) -> Callable[[Make], Make]:
    """Register what a function makes under a name; `traits` are those of Implementation."""

    def register(make: Make) -> Make:
        REGISTERED[name] = Implementation(make, **traits)
        return make

    return register


def implementations(
    device: torch.device, chosen: Sequence[str] | None = None
) -> dict[str, Implementation]:
    """Those that the device and the installed packages have, in the order of registration; or the
    chosen ones of them.

    Raises ValueError for a chosen one that cannot run here.
    """
    here = {
        name: found
        for name, found in REGISTERED.items()
        if device.type in found.devices
        and (found.needs is None or importlib.util.find_spec(found.needs))
    }
    if chosen is None:
        return {
            name: found for name, found in here.items() if device.type not in found.only_if_chosen
        }
    if missing := [name for name in chosen if name not in here]:
        raise ValueError(
            f"--impl: expected some of {', '.join(here)} on this device, got {', '.join(missing)}"
        )
    return {name: found for name, found in here.items() if name in chosen}


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

    def whole_world(process_group: Any, training: bool, input: Tensor) -> Any:
        return dist.group.WORLD if training else None

    functional._group_to_synchronize = whole_world
    try:
        yield
    finally:
        functional._group_to_synchronize = original


implementation("torch_syncbn", devices=("cuda",))(SynchronizedTorchSyncBatchNorm)
implementation("gather_syncbn", devices=("cpu",))(GatherSyncBN)
implementation("torch_batchnorm", synchronized=False)(BatchNorm)
implementation(OURS)(triton_syncbn.SyncBN)


@implementation("triton_syncbn_compiled", only_if_chosen=("cpu",), may_fail=True)
def compiled(channels: int) -> torch.nn.Module:
    """Ours under torch.compile; not by default on a CPU, where compiling takes longest of all.

    Graphs of layers before are dropped: torch makes only so many of one function.
    """
    torch._dynamo.reset()
    # a backward that frees what forward saved cannot be run twice
    torch._functorch.config.donated_buffer = False
    layer = triton_syncbn.SyncBN(channels)
    layer.compile(fullgraph=True)
    return layer


@implementation("inplace_abn", devices=("cuda",), needs="inplace_abn", in_place=True, may_fail=True)
def inplace_abn(channels: int) -> torch.nn.Module:
    """InPlaceABNSync with no activation; its factor is abs(weight) + eps, so 1 takes 1 - eps."""
    from inplace_abn import InPlaceABNSync

    layer = InPlaceABNSync(channels, activation="identity")
    torch.nn.init.constant_(layer.weight, 1.0 - layer.eps)
    return layer


@implementation("apex", devices=("cuda",), needs="apex", may_fail=True)
def apex(channels: int) -> torch.nn.Module:
    """The layer for channels first; others are copied by it."""
    from apex.parallel import SyncBatchNorm

    return SyncBatchNorm(channels)
