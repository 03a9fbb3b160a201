"""What whole networks hold between forward and backward, fused and in eager torch."""

import pathlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.blocks_to_fuse import CHANNELS, BasicBlock, Bottleneck, ResNet
from triton_syncbn import convert_sync_batchnorm

ROOT = next(p for p in pathlib.Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
DOCUMENT = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
NETWORKS = (BasicBlock, (2, 2, 2, 2)), (Bottleneck, (3, 4, 6, 3))  # ResNet-18 and ResNet-50
ROWS = {
    "bfloat16": (torch.bfloat16, "kernels"),
    "float32, on a CPU": (torch.float32, "plain_torch"),
    "float32, on a GPU": (torch.float32, "kernels"),
}


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def bytes_saved(network, input):
    """Of tensors that are neither parameters nor buffers, each storage once."""
    own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # which keeps it from being made twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(input)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("row", ROWS)
def test_what_a_network_saves_is_what_the_documents_say(row, default_dtype, request):
    """The maps that torch saves with ReLU in place, or fewer, and the gates of sums: tensors of
    full size, without memory.
    """
    dtype, where = ROWS[row]
    if where == "plain_torch":
        request.getfixturevalue(where)
    ratios = []
    with FakeTensorMode():
        default_dtype(dtype)
        for block, depths in NETWORKS:
            network = ResNet(block, depths, width=64)
            input = torch.randn(8, CHANNELS, 224, 224)
            eager = bytes_saved(network, input)
            fused = bytes_saved(convert_sync_batchnorm(network, fuse=True), input)
            ratios.append(f"{fused / eager:.3f}")
    assert f"| {row} | {' | '.join(ratios)} |" in DOCUMENT
