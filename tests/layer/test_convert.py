"""Conversion to SyncBN and back."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
    assert all(isinstance(layer, SyncBN) for layer in layers)
    assert all(map(isinstance, layers[:3], LAYERS))
    assert type(model.stock) is SyncBN
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
    attributes = set(vars(layer))
    assert convert_sync_batchnorm(layer) is layer
    assert isinstance(layer, SyncBN)
    assert layer.process_group is None
    assert list(layer.state_dict()) == list(state)
    if LAYERS[original]:
        assert layer(torch.randn(LAYERS[original])).shape == LAYERS[original]
    assert type(SyncBN.revert_sync_batchnorm(layer)) is original
    assert set(vars(layer)) == attributes


def test_a_layer_made_as_syncbn_becomes_a_batch_norm_of_any_dimension():
    model = torch.nn.Sequential(SyncBN(3))
    revert_sync_batchnorm(model)
    assert type(model[0]) is triton_syncbn.conversion.convert.BatchNorm
    for shape in ((4, 3), (4, 3, 5), (4, 3, 5, 5)):
        assert model(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"input: expected shape \(N, C, \*spatial\)"):
        model(torch.randn(3))
    with torch.no_grad():
        expected = model.eval()(torch.ones(4, 3, 5))
        for scripted in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
            assert torch.equal(scripted(torch.ones(4, 3, 5)), expected)


def test_a_subclass_that_keeps_the_forward_is_converted():
    class Named(torch.nn.BatchNorm2d):
        label = "mine"

    layer = Named(3)
    convert_sync_batchnorm(layer)
    assert isinstance(layer, SyncBN)
    assert isinstance(layer, Named)
    assert layer.label == "mine"
    assert type(revert_sync_batchnorm(layer)) is Named


def test_a_subclass_of_ours_converts_to_itself():
    """Also where its converter is reached through a converted layer."""

    class Special(SyncBN):
        pass

    model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3), torch.nn.SyncBatchNorm(3)])
    Special.convert_sync_batchnorm(model)
    assert isinstance(model[0], Special)
    assert isinstance(model[0], torch.nn.BatchNorm1d)
    assert type(model[1]) is Special
    other = model[0].convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
    assert type(other) is type(model[0])
    Special.revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm]


def parametrize(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())


def shard(layer):
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    "wrap, message",
    [
        (parametrize, "layers without parametrizations, got Parametrized"),
        (shard, "layers that fully_shard has not wrapped, got FSDP"),
    ],
)
def test_a_layer_whose_class_is_in_use_is_refused_before_anything_changes(wrap, message, one_rank):
    """Both ways; wrapped when it is converted already, it works."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    wrap(model[1])
    kind = type(model[1])
    with pytest.raises(ValueError, match=f"module: expected {message}BatchNorm2d '1'"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm2d
    assert type(model[1]) is kind

    model = convert_sync_batchnorm(torch.nn.Sequential(*map(torch.nn.BatchNorm2d, (3, 3))))
    wrap(model[1])
    model(torch.randn(4, 3, 2, 2)).sum().backward()
    assert len(list(model[1].parameters())) == 2
    assert all(parameter.grad is not None for parameter in model[1].parameters())
    with pytest.raises(ValueError, match=f"module: expected {message}SyncBatchNorm2d '1'"):
        revert_sync_batchnorm(model)
    assert isinstance(model[0], SyncBN)


def test_a_lazy_layer_is_an_error_until_it_has_a_shape():
    model = torch.nn.Sequential(torch.nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="module: expected initialized layers, got the lazy"):
        convert_sync_batchnorm(model)
    model(torch.randn(2, 3, 4, 4))
    convert_sync_batchnorm(model)
    assert isinstance(model[0], SyncBN)


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
    model.first.process_group = dist.group.WORLD
    assert copy.copy(model.first).process_group is dist.group.WORLD
    duplicate = copy.deepcopy(model)
    assert type(revert_sync_batchnorm(duplicate).first) is torch.nn.BatchNorm1d
    assert isinstance(model.first, SyncBN)


def test_a_converted_model_can_be_copied(reference_ranks):
    reference_ranks.run(converted_copy_and_pickle, 1)
