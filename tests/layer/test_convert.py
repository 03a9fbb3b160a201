"""Conversion to SyncBN and back."""

import copy

import pytest
import torch

import triton_syncbn
from triton_syncbn import SyncBN, convert_sync_batchnorm, revert_sync_batchnorm

LAYERS = {
    torch.nn.BatchNorm1d: (4, 3, 5),
    torch.nn.BatchNorm2d: (4, 3, 5, 5),
    torch.nn.BatchNorm3d: (4, 3, 2, 5, 5),
    torch.nn.SyncBatchNorm: None,
}


class Model(torch.nn.Module):
    """One layer of each kind, one of them under two names and in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.BatchNorm1d(3, momentum=None)
        self.blocks = torch.nn.ModuleList([torch.nn.BatchNorm2d(3, affine=False)])
        self.third = torch.nn.BatchNorm3d(3, track_running_stats=False)
        self.stock = torch.nn.SyncBatchNorm(3)
        self.alias = self.first
        self.listed = [self.first]
        self.other = torch.nn.InstanceNorm2d(3, track_running_stats=True)


def test_layers_keep_all_they_hold():
    model = Model()
    model.blocks.eval()
    model.first.weight.requires_grad_(False)
    model.first.note = "kept"
    model.first.running_mean.fill_(2.0)
    model.first.register_forward_hook(lambda module, inputs, output: output + 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    assert convert_sync_batchnorm(model) is model

    layers = (model.first, model.blocks[0], model.third, model.stock)
    assert all(type(layer) is SyncBN for layer in layers)
    assert model.alias is model.listed[0] is model.first
    assert type(model.other) is torch.nn.InstanceNorm2d
    assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())
    assert all(dict(model.named_buffers())[name] is value for name, value in buffers.items())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in parameters.values()
    }
    assert [layer.training for layer in layers] == [True, False, True, True]
    assert model.first.note == "kept"
    assert not model.first.weight.requires_grad
    assert model.first.momentum is None
    output = model.first(torch.randn(5, 3))
    assert output.mean() > 0.9  # the hook added one

    assert revert_sync_batchnorm(model) is model
    assert [type(layer) for layer in layers] == list(LAYERS)
    assert model.alias is model.listed[0] is model.first
    assert not hasattr(model.first, "process_group")
    assert not hasattr(model.first, "converted_from")
    assert model.first.note == "kept"
    assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())


@pytest.mark.parametrize("original", LAYERS)
def test_a_layer_by_itself(original):
    layer = original(3)
    state = copy.deepcopy(layer.state_dict())
    assert convert_sync_batchnorm(layer) is layer
    assert type(layer) is SyncBN
    assert layer.process_group is None
    assert list(layer.state_dict()) == list(state)
    if LAYERS[original]:
        assert layer(torch.randn(LAYERS[original])).shape == LAYERS[original]
    assert type(SyncBN.revert_sync_batchnorm(layer)) is original


def test_a_layer_made_as_syncbn_becomes_a_batch_norm_of_any_dimension():
    model = torch.nn.Sequential(SyncBN(3))
    revert_sync_batchnorm(model)
    assert type(model[0]) is triton_syncbn.convert.BatchNorm
    for shape in ((4, 3), (4, 3, 5), (4, 3, 5, 5)):
        assert model(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"input: expected shape \(N, C, \*spatial\)"):
        model(torch.randn(3))


def test_a_subclass_with_a_forward_of_its_own_is_left_with_a_warning():
    class BatchNormRelu(torch.nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    model = torch.nn.ModuleDict({"act": BatchNormRelu(3), "plain": torch.nn.BatchNorm2d(3)})
    with pytest.warns(UserWarning, match="layer 'act' is left unsynchronized: BatchNormRelu"):
        convert_sync_batchnorm(model)
    assert type(model["act"]) is BatchNormRelu
    assert type(model["plain"]) is SyncBN


def test_a_subclass_that_keeps_the_forward_is_converted():
    class Named(torch.nn.BatchNorm2d):
        label = "mine"

    layer = Named(3)
    assert type(convert_sync_batchnorm(layer)) is SyncBN
    assert type(revert_sync_batchnorm(layer)) is Named


def test_a_lazy_layer_is_an_error_until_it_has_a_shape():
    model = torch.nn.Sequential(torch.nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="module: expected initialized layers, got the lazy"):
        convert_sync_batchnorm(model)
    model(torch.randn(2, 3, 4, 4))
    convert_sync_batchnorm(model)
    assert type(model[0]) is SyncBN


def convert_with_groups(rank, world_size):
    mine, other = torch.distributed.new_group([0, 1]), torch.distributed.new_group([0, 1])
    model = torch.nn.ModuleList(
        [torch.nn.BatchNorm1d(3), torch.nn.SyncBatchNorm(3, process_group=other)]
    )
    convert_sync_batchnorm(model)
    assert model[0].process_group is None
    assert model[1].process_group is other  # its own stays
    SyncBN.convert_sync_batchnorm(model, mine)
    assert model[0].process_group is model[1].process_group is mine
    revert_sync_batchnorm(model)
    assert type(model[1]) is torch.nn.SyncBatchNorm
    assert model[1].process_group is mine


def test_process_groups(reference_ranks):
    reference_ranks.run(convert_with_groups, 2)


def converted_copy_and_pickle(rank, world_size):
    model = convert_sync_batchnorm(Model())
    duplicate = copy.deepcopy(model)
    assert type(revert_sync_batchnorm(duplicate).first) is torch.nn.BatchNorm1d
    assert type(model.first) is SyncBN


def test_a_converted_model_can_be_copied(reference_ranks):
    reference_ranks.run(converted_copy_and_pickle, 1)
