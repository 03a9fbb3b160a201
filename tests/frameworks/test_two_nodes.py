"""torchrun with two agents, as on two nodes."""

import json
import re

import pytest

from tests.support.torchrun import printed_on_two_nodes

pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, torch, torch.distributed as dist
from triton_syncbn import SyncBN, sync_group

dist.init_process_group("gloo")
rank, node = dist.get_rank(), sync_group("node")
values = torch.tensor([[0.0], [2.0]]) + 10.0 * rank
layers = {"all": SyncBN(1, momentum=1.0), "node": SyncBN(1, momentum=1.0, process_group=node)}
means = {}
for name, layer in layers.items():
    layer(values.requires_grad_()).pow(3).sum().backward()
    means[name] = layer.running_mean.item()
agent, ranks = int(os.environ["GROUP_RANK"]), dist.get_process_group_ranks(node)
print(json.dumps({"rank": rank, "agent": agent, "ranks": ranks, **means}))
dist.barrier()  # who leaves at once ends its agent, and that the other one
dist.destroy_process_group()
"""


def test_nodes_synchronize_all_ranks_or_each_its_own(tmp_path):
    """Rank r has values around 10 r + 1; node n has the ranks 2 n and 2 n + 1."""
    program = tmp_path / "nodes.py"
    program.write_text(PROGRAM, encoding="utf-8")
    lines = sorted(
        # two processes may print on one line
        map(json.loads, re.findall(r"{.*?}", printed_on_two_nodes(program))),
        key=lambda answer: answer["rank"],
    )
    assert lines == [
        {
            "rank": rank,
            "agent": rank // 2,
            "ranks": [rank // 2 * 2, rank // 2 * 2 + 1],
            "all": 16.0,
            "node": 6.0 if rank < 2 else 26.0,
        }
        for rank in range(4)
    ]
