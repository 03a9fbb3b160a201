"""Collectives as torch's tools see them: one a layer in each graph of a compiled model, and one a
pass for the counter of DTensor.
"""

import torch
import torch._dynamo
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.distributed.tensor.debug import CommDebugMode

from triton_syncbn import SyncBN


def collectives_of_graphs(rank, world_size):
    """How often forward and backward graph sum over ranks, by any name, and batches counted."""
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), SyncBN(4), torch.nn.ReLU(), SyncBN(4, momentum=None)
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        compiled(torch.randn(2 + rank, 3, 6, 6).requires_grad_()).sum().backward()
    counts = [
        [str(node.target) for node in graph.graph.nodes if "reduce" in str(node.target)]
        for graph in (*backend.fw_graphs, *backend.bw_graphs)
    ]
    return counts, [int(model[index].num_batches_tracked) for index in (1, 3)]


def test_one_collective_a_layer_in_each_graph(reference_ranks):
    name = "_c10d_functional.all_reduce.default"
    for counts, batches in reference_ranks.run(collectives_of_graphs, 2):
        assert counts == [[name] * 2, [name] * 2]
        assert batches == [2, 2]


def counted_by_torch(rank, world_size):
    layer = SyncBN(3)
    with CommDebugMode() as mode:
        layer(torch.randn(2, 3).requires_grad_()).sum().backward()
    return {str(name): count for name, count in mode.get_comm_counts().items()}


def test_torch_counts_the_collectives(reference_ranks):
    assert reference_ranks.run(counted_by_torch, 2) == [{"c10d.allreduce_": 2}] * 2
