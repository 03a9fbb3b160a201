"""Bytes and modelled latency of the two ways to synchronize a forward pass: gather the statistics
of all ranks, or add them up.

Everything here is a formula; nothing is measured. The formulas are those of Thakur, Rabenseifner
and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005), for n bytes on
each of p ranks, alpha a hop and beta a byte; the time to add numbers up (gamma) is left out:

    ring gather         (p - 1) alpha + (p - 1) n beta
    doubling gather     log2(p) alpha + (p - 1) n beta
    ring all_reduce     2 (p - 1) alpha + 2 (p - 1) / p n beta    reduce_scatter, then gather
    tree all_reduce     2 log2(p) (alpha + n beta)                reduce, then broadcast

A hop within a node and one between nodes differ: of the hops of a ring over several nodes, one a
node crosses the network (two in an all_reduce), and the slowest link sets the bandwidth; a tree
climbs within the node first.
"""

import dataclasses
import math

GATHERED_ITEM_BYTES = 4  # mean, 1/std and count of torch.nn.SyncBatchNorm: float32
REDUCED_ITEM_BYTES = 8  # sum(x), sum(x**2) and count of SyncBN: float64


@dataclasses.dataclass(frozen=True)
class Network:
    """What a hop and a byte cost: assumptions, of the size that they have in clusters of 8-GPU
    nodes.

    Latencies are those by which NCCL chooses an algorithm for small messages (its LL protocol,
    src/graph/tuning.cc). Bandwidths are half of what NVLink 4 and InfiniBand NDR (one adapter a
    GPU) promise in a direction: messages of this size do not fill a link.
    """

    ranks_per_node: int = 8
    start_us: float = 6.6
    nvlink_hop_us: float = 0.6
    infiniband_ring_hop_us: float = 2.7
    infiniband_tree_hop_us: float = 5.0
    nvlink_gbytes_per_s: float = 225.0
    infiniband_gbytes_per_s: float = 25.0

    def nodes(self, world_size: int) -> int:
        """Nodes that so many ranks fill."""
        return math.ceil(world_size / self.ranks_per_node)

    def levels(self, world_size: int) -> tuple[int, int]:
        """Levels of a binary tree over the ranks: within a node, and between nodes."""
        inside = math.ceil(math.log2(min(world_size, self.ranks_per_node)))
        return inside, math.ceil(math.log2(self.nodes(world_size)))

    def slowest_us(self, world_size: int, size: float) -> float:
        """Time of `size` bytes on the slowest link between the ranks."""
        one_node = self.nodes(world_size) == 1
        speed = self.nvlink_gbytes_per_s if one_node else self.infiniband_gbytes_per_s
        return size / speed * 1e-3

    def describe(self) -> str:
        """Every constant with its value and unit, for the line under a table."""
        return ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(self).items())


def numbers_sent(channels: int) -> int:
    """Numbers that a rank contributes in forward, by either way: two a channel and a count."""
    return 2 * channels + 1


def gather_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives in a gather of float32 from all others."""
    return (world_size - 1) * numbers_sent(channels) * GATHERED_ITEM_BYTES


def all_reduce_bytes(world_size: int, channels: int) -> float:
    """Bytes that a rank receives in a ring all_reduce of float64."""
    return 2 * (world_size - 1) / world_size * numbers_sent(channels) * REDUCED_ITEM_BYTES


def gather_us(world_size: int, channels: int, network: Network) -> float:
    """Modelled latency of a gather in a ring, NCCL's way as a rule, microseconds."""
    return (
        network.start_us
        + _ring_hops_us(world_size, network)
        + network.slowest_us(world_size, gather_bytes(world_size, channels))
    )


def gather_doubling_us(world_size: int, channels: int, network: Network) -> float:
    """Modelled latency of a gather by recursive doubling, microseconds: the fewest hops that a
    gather can have.
    """
    inside, between = network.levels(world_size)
    return (
        network.start_us
        + inside * network.nvlink_hop_us
        + between * network.infiniband_tree_hop_us
        + network.slowest_us(world_size, gather_bytes(world_size, channels))
    )


def all_reduce_ring_us(world_size: int, channels: int, network: Network) -> float:
    """Modelled latency of an all_reduce in a ring, microseconds."""
    return (
        network.start_us
        + 2 * _ring_hops_us(world_size, network)
        + network.slowest_us(world_size, all_reduce_bytes(world_size, channels))
    )


def all_reduce_tree_us(world_size: int, channels: int, network: Network) -> float:
    """Modelled latency of an all_reduce as a reduce and a broadcast in a binary tree,
    microseconds.
    """
    inside, between = network.levels(world_size)
    size = numbers_sent(channels) * REDUCED_ITEM_BYTES
    inside_us = network.nvlink_hop_us + size / network.nvlink_gbytes_per_s * 1e-3
    between_us = network.infiniband_tree_hop_us + size / network.infiniband_gbytes_per_s * 1e-3
    return network.start_us + 2 * (inside * inside_us + between * between_us)


def _ring_hops_us(world_size: int, network: Network) -> float:
    """Hops of what goes once around the ring."""
    between = network.nodes(world_size) - 1
    inside = world_size - 1 - between
    return inside * network.nvlink_hop_us + between * network.infiniband_ring_hop_us
