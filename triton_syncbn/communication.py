"""The one all_reduce of a pass, with the layer's name in its errors; and a check that ranks agree.

Ranks that are not in the same layer at the same time add up what does not belong together, or wait
for each other forever. With `debug` on, a fingerprint of the layer and the call goes with the sums.
"""

import collections
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import groups

# What is sent with debug on has this size or a larger power of two, so that layers which differ in
# their channels meet in one all_reduce and see it.
_LEAST_SIZE = 1 << 14

_checking = False
_calls: collections.Counter[str] = collections.Counter()


class debug:
    """Check in every pass of every layer that all ranks are in the same layer, for the same time.

    `debug()` or `debug(True)` turns the check on, `debug(False)` off; `with debug():` for a block.
    All ranks must turn it on at the same point. A rank that finds itself in another layer or call
    than others raises a RuntimeError with the layer, the pass and the number of its call.

    The fingerprints travel in the all_reduce that a pass makes anyway, which grows to 128 KiB, and
    the host waits for it: it is for finding a fault. Layers are named by `convert_sync_batchnorm`,
    or by the order in which they were made. A compiled graph is not checked.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _checking
        self.previous = _checking
        _checking = enabled
        _calls.clear()

    def __enter__(self) -> "debug":
        return self

    def __exit__(self, *error: object) -> None:
        global _checking
        _checking = self.previous


def all_reduce(sums: Tensor, group: Any, layer_name: str, pass_name: str) -> Tensor:
    """The sum of a float64 tensor over the ranks of a group; the tensor itself is used up.

    Raises RuntimeError with the name of the layer where the group reports an error: a rank that
    died, that left, or that did not come within the timeout of the group. And ValueError, before
    anything is sent, where the group does not serve the device.
    """
    if torch.compiler.is_compiling():
        dist.all_reduce(sums, group=group)
        return sums
    if torch._C._len_torch_dispatch_stack() > 0 and _operators_are_recorded():
        return _all_reduce_as_operator(sums, group.group_name, layer_name, pass_name)
    return all_reduce_now(sums, group, layer_name, pass_name)


def all_reduce_now(sums: Tensor, group: Any, layer_name: str, pass_name: str) -> Tensor:
    """The same, where nothing compiles or records what is called."""
    try:
        if not _checking:
            dist.all_reduce(sums, group=group)
            return sums
        agreed = _all_reduce_checked(sums, group, layer_name, pass_name)
    except RuntimeError as error:
        groups.check_served(sums.device, group)  # takes 2 us; if it raises, nothing was sent
        raise RuntimeError(
            f"SyncBN layer {layer_name!r}: the all_reduce of its {pass_name} failed: {error}"
        ) from error
    if not agreed:
        call = f"its {pass_name}, call {_calls[group.group_name]} of this rank"
        raise RuntimeError(
            f"SyncBN layer {layer_name!r}: in {call}, other ranks are in another layer or another "
            "call. Does every rank use the same layers in the same order, all of them in training "
            "mode?"
        )
    return sums


def _all_reduce_checked(sums: Tensor, group: Any, layer_name: str, pass_name: str) -> bool:
    """All-reduce sums together with a fingerprint; whether that of all ranks is the same.

    The fingerprint is two integers of 20 bits, sent with their squares. Numbers a whose sum is
    W * mine and whose squares' sum is W * mine**2 have no variance, so they are all mine; for up to
    4096 ranks these sums are exact in float64.
    """
    groups.check_served(sums.device, group)  # before a call is counted
    _calls[group.group_name] += 1
    call = f"{layer_name}|{pass_name}|{_calls[group.group_name]}|{sums.numel()}"
    digest = int.from_bytes(hashlib.blake2b(call.encode(), digest_size=5).digest())
    one, two = digest >> 20, digest & 0xFFFFF
    mine = torch.tensor([one, one**2, two, two**2], dtype=torch.float64)
    size = max(_LEAST_SIZE, 1 << (sums.numel() + 4 - 1).bit_length())
    message = sums.new_zeros(size)
    message[:4] = mine
    message[4 : 4 + sums.numel()] = sums.flatten()
    dist.all_reduce(message, group=group)
    sums.copy_(message[4 : 4 + sums.numel()].view_as(sums))
    return torch.equal(message[:4].cpu(), mine * dist.get_world_size(group))


def _operators_are_recorded() -> bool:
    """Whether a mode is active that may keep what operators return; torch's counter of collectives
    does not, and counts its own ones alone.
    """
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__name__ != "CommDebugMode" for mode in modes)


def _all_reduce_copy(sums: Tensor, group_name: str, layer_name: str, pass_name: str) -> Tensor:
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    return all_reduce(sums.clone(), group, layer_name, pass_name)


# What records operators, as selective checkpointing does to keep their results, must see none whose
# result changes afterwards.
_library = torch.library.Library("triton_syncbn", "FRAGMENT")
_library.define(
    "all_reduce(Tensor sums, str group_name, str layer_name, str pass_name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("all_reduce", _all_reduce_copy, "CompositeExplicitAutograd")
torch.library.register_fake(
    "triton_syncbn::all_reduce", lambda sums, *names: torch.empty_like(sums), lib=_library
)
_all_reduce_as_operator = torch.ops.triton_syncbn.all_reduce.default
