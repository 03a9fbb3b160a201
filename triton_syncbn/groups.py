"""The ranks that share their statistics: groups of k ranks or of a node, and what `process_group`
may be.
"""

import os
import socket
from typing import Any, Literal

import torch
import torch.distributed as dist

_DESTROYED = "process_group: expected a group that exists, got one that was destroyed"

_made: dict[tuple[tuple[int, ...], ...], Any] = {}  # by the division of the ranks they belong to


def sync_group(size: int | Literal["node"]) -> Any:
    """This rank's group of `size` consecutive ranks, or of the ranks of its node, to synchronize
    batch norm in (Peng et al. 2018, "MegDet").

    All ranks must make the call, in the same order as other calls that make groups. The same
    division gives the same group again; a group of all ranks is the default one.

    Args:
        size: a divisor of the number of ranks; or "node" for the ranks with the same host, and the
            same agent of torchrun. Nodes may differ in their number of ranks.

    Returns:
        A torch.distributed.ProcessGroup, for `process_group`.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError, ValueError: size is neither.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "sync_group: expected an initialized torch.distributed; call init_process_group first"
        )
    division = _divide(size, dist.get_world_size())
    if len(division) == 1:
        return dist.group.WORLD
    group = _made.get(division)
    if group is None or not exists(group):
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in division])
        _made[division] = group
    return group


def _divide(size: int | str, world_size: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each group."""
    places: list[Any] = [None] * world_size
    if size == "node":
        dist.all_gather_object(places, (socket.gethostname(), os.environ.get("GROUP_RANK")))
    elif type(size) is not int:
        raise TypeError(f'size: expected an int or "node", got {size!r}')
    elif size < 1 or world_size % size:
        raise ValueError(f"size: expected a divisor of {world_size}, the world size, got {size}")
    else:
        places = [rank // size for rank in range(world_size)]
    members: dict[Any, list[int]] = {}
    for rank, place in enumerate(places):
        members.setdefault(place, []).append(rank)
    return tuple(map(tuple, members.values()))


def resolve(process_group: Any) -> Any:
    """The ProcessGroup that a `process_group` other than None stands for.

    Raises TypeError or ValueError where it is none that this rank can communicate in.
    """
    if not dist.is_available():
        raise TypeError(
            "process_group: expected None, as this torch has no torch.distributed, "
            f"got {type(process_group).__name__}"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group: expected a group that this rank belongs to, got one without it"
            )
        if not isinstance(process_group, dist.DeviceMesh):
            raise TypeError(
                "process_group: expected a torch.distributed.ProcessGroup, a 1-D DeviceMesh or "
                f"None, got {type(process_group).__name__}"
            )
        process_group = _group_of_mesh(process_group)
    if not torch.compiler.is_compiling() and not exists(process_group):
        raise ValueError(_DESTROYED)
    return process_group


def check_served(device: torch.device, group: Any) -> None:
    """Raise ValueError where a group has no backend for a device."""
    backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    if f"{device.type}:" not in backends:
        raise ValueError(
            f"input: expected a device that the process group serves ({backends}), got {device}"
        )


def _group_of_mesh(mesh: Any) -> Any:
    if mesh.ndim != 1:
        raise ValueError(
            f"process_group: expected a 1-D DeviceMesh, got shape {tuple(mesh.shape)}; a dimension "
            'of it is one, such as mesh["data"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            "process_group: expected a DeviceMesh that this rank belongs to, got one without it"
        )
    try:
        return mesh.get_group()
    except RuntimeError as error:
        raise ValueError(_DESTROYED) from error


def exists(group: Any) -> bool:
    """Whether a group has not been destroyed."""
    try:
        dist.get_global_rank(group, 0)  # looks the group up, and its first rank
    except ValueError:
        return False
    return True


def describe(process_group: Any) -> str:
    """The ranks of a `process_group` other than None, or why there are none; never raises."""
    try:
        return f"ranks {dist.get_process_group_ranks(resolve(process_group))}"
    except (TypeError, ValueError) as error:
        return str(error).rpartition("got ")[2]
