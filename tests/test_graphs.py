"""Graphs of compiled models: one collective a layer in each, and buffers that move once a step."""

import torch
import torch._dynamo
from torch._dynamo.testing import AotEagerAndRecordGraphs

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
