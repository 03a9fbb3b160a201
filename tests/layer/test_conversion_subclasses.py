"""Layers with a forward of their own: their batch normalization is synchronized, and nothing else
changes; or they are left alone, and a warning says why.
"""

import copy
import pickle
import types
import warnings

import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tests.support import subclasses
from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, convert_sync_batchnorm, revert_sync_batchnorm
from triton_syncbn.conversion import subclass_forward

CHANNELS = 3
SIZES = (4, 1)


def make_layer(layer_class):
    layer = layer_class(CHANNELS).double()
    layer.eps = 0.01  # no default of anything
    if layer.affine:
        nn.init.normal_(layer.weight, 1.0, generator=torch.Generator().manual_seed(0))
    return layer


def unsynchronized(layer_class):
    """A layer that runs on a CPU by itself: of torch's synchronized layer, the plain one."""
    if not issubclass(layer_class, nn.SyncBatchNorm):
        return make_layer(layer_class)
    forward = subclass_forward.rebuilt(layer_class.forward, class_cell=types.CellType())
    plain = type(layer_class.__name__, (nn.BatchNorm2d,), {"forward": forward})
    forward.__closure__[0].cell_contents = plain
    return make_layer(plain)


def make_input():
    values = torch.randn(sum(SIZES), CHANNELS, 3, 3, generator=torch.Generator().manual_seed(1))
    return values.double()


def two_steps(layer, input):
    """Outputs, gradients and buffers of two steps of training, then an output in eval mode."""
    outputs = []
    input = input.clone().requires_grad_()
    for step in range(2):
        output = layer(input + step)
        output.pow(3).sum().backward()
        outputs.append(output.detach())
    output = layer.eval()(input).detach()
    layer.train()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return outputs, output, input.grad, gradients, dict(layer.named_buffers())


def steps_of_a_rank(rank, world_size, layer_class):
    layer = make_layer(layer_class)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_sync_batchnorm(layer)
    with counted_communication() as calls:
        results = two_steps(layer, make_input().split(SIZES)[rank])
    assert [name for name, *_ in calls] == ["all_reduce"] * 4
    return results


@pytest.mark.parametrize("layer_class", subclasses.SYNCHRONIZED)
def test_any_split_gives_what_the_layer_gives_for_the_whole_batch(layer_class, reference_ranks):
    """In float64, up to roundings of sums over 45 values in another order."""
    ranks = reference_ranks.run(steps_of_a_rank, len(SIZES), layer_class)
    outputs, evaluated, grad_input, gradients, buffers = two_steps(
        unsynchronized(layer_class), make_input()
    )
    close = {"rtol": 1e-12, "atol": 1e-11}
    for step in range(2):
        parts = torch.cat([results[0][step] for results in ranks])
        torch.testing.assert_close(parts, outputs[step], **close)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), evaluated, **close)
    torch.testing.assert_close(torch.cat([r[2] for r in ranks]), grad_input, **close)
    for name, gradient in gradients.items():
        parts = [results[3][name] for results in ranks]
        if gradient is None:
            assert parts == [None, None]
        else:
            torch.testing.assert_close(sum(parts), gradient, **close)
    for name, buffer in buffers.items():
        for results in ranks:
            torch.testing.assert_close(results[4][name], buffer, **close)


@pytest.mark.parametrize("layer_class", subclasses.SYNCHRONIZED)
def test_a_layer_stays_what_it_was(layer_class, plain_torch):
    layer = make_layer(layer_class)
    layer.note = "kept"
    convert_sync_batchnorm(layer)
    assert isinstance(layer, SyncBN)
    if not issubclass(layer_class, nn.SyncBatchNorm):
        assert isinstance(layer, layer_class)
    assert not isinstance(layer, nn.SyncBatchNorm)  # DistributedDataParallel refuses it on a CPU
    assert repr(layer).startswith(f"Sync{layer_class.__name__.removeprefix('Sync')}(")
    assert f"{CHANNELS}, eps=0.01, momentum={layer.momentum}" in repr(layer)
    layer(make_input())
    copies = pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)
    for duplicate in copies:
        assert type(duplicate) is type(layer)
        assert duplicate.note == "kept"
        assert torch.equal(duplicate.eval()(make_input()), layer.eval()(make_input()))
        assert type(revert_sync_batchnorm(duplicate)) is layer_class
    another = convert_sync_batchnorm(make_layer(layer_class))
    assert type(another) is type(layer)


@pytest.mark.parametrize("layer_class", subclasses.SYNCHRONIZED)
def test_eval_gives_the_same_bits_before_and_after(layer_class, plain_torch):
    layer = make_layer(layer_class).float()
    input = make_input().float()
    layer.running_mean.uniform_()
    layer.running_var.uniform_()
    before = layer.eval()(input)
    assert torch.equal(convert_sync_batchnorm(layer)(input), before)
    assert torch.equal(revert_sync_batchnorm(layer)(input), before)


def compiled_steps_of_a_rank(rank, world_size, layer_class):
    """How often the graphs of a compiled layer communicate, whose results are those of an eager
    one.
    """
    torch._dynamo.reset()
    communicating = []

    def keep(graph, inputs):
        communicating.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    plain, layer = (convert_sync_batchnorm(make_layer(layer_class)) for _ in range(2))
    input = make_input().split(SIZES)[rank].requires_grad_()
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for step in range(2):
        for one in (plain, compiled):
            one(input + step).pow(3).sum().backward()
    for name, tensor in [*plain.named_buffers(), *plain.named_parameters()]:
        other = dict(layer.named_buffers()).get(name, dict(layer.named_parameters()).get(name))
        torch.testing.assert_close(other, tensor)
        torch.testing.assert_close(other.grad, tensor.grad)
    return communicating


@pytest.mark.parametrize("layer_class", subclasses.SYNCHRONIZED)
def test_a_compiled_layer_is_one_graph_with_one_all_reduce_a_pass(layer_class, reference_ranks):
    for graphs in reference_ranks.run(compiled_steps_of_a_rank, len(SIZES), layer_class):
        assert graphs == [1, 1]


@pytest.mark.parametrize("layer_class", subclasses.LEFT_ALONE)
def test_what_cannot_be_exchanged_is_left_with_its_reason(layer_class):
    layer = layer_class(CHANNELS)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), layer)
    reason = f"layer '1' is left unsynchronized: the forward of {layer_class.__name__} "
    with pytest.warns(UserWarning, match=reason + subclasses.LEFT_ALONE[layer_class]) as warned:
        convert_sync_batchnorm(model)
    assert len(warned) == 1
    assert warned[0].filename == __file__  # where the model was converted
    assert type(layer) is layer_class
    assert not hasattr(layer, "process_group") or issubclass(layer_class, nn.SyncBatchNorm)
    assert isinstance(model[0], SyncBN)


def test_a_forward_of_one_layer_is_left_with_its_reason():
    layer = nn.BatchNorm2d(CHANNELS)
    layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="has been replaced in this one layer"):
        convert_sync_batchnorm(layer)
    assert type(layer) is nn.BatchNorm2d


def class_and_output(rank, world_size, layer):
    return type(layer).__mro__[1].__name__, layer.eval()(make_input())


@pytest.mark.parametrize("layer_class", subclasses.SYNCHRONIZED)
def test_a_pickle_is_read_in_another_process(layer_class, reference_ranks):
    layer = convert_sync_batchnorm(make_layer(layer_class))
    expected = class_and_output(0, 1, layer)
    ((name, output),) = reference_ranks.run(class_and_output, 1, layer)
    assert name == expected[0]
    assert torch.equal(output, expected[1])


def test_without_running_statistics_eval_uses_the_batch_of_the_rank(plain_torch):
    layer = subclasses.BatchNormDropAct(CHANNELS, track_running_stats=False).eval()
    input = torch.randn(4, CHANNELS, 3, 3)
    before = layer(input)
    assert torch.equal(convert_sync_batchnorm(layer)(input), before)


def test_an_exchanged_forward_lives_where_the_original_does(monkeypatch, plain_torch):
    """Its globals are the same ones, so a change of them is seen, and its lines are those of the
    source, so that a traceback shows them.
    """
    layer = convert_sync_batchnorm(subclasses.BatchNormInMethod(CHANNELS))
    ours, theirs = type(layer).normalize, subclasses.BatchNormInMethod.normalize
    assert ours is not theirs
    assert ours.__globals__ is theirs.__globals__
    assert ours.__kwdefaults__ == theirs.__kwdefaults__
    assert ours.__qualname__ == ours.__code__.co_qualname == theirs.__qualname__
    assert ours.__code__.co_filename == theirs.__code__.co_filename
    assert ours.__code__.co_firstlineno == theirs.__code__.co_firstlineno

    class Replaced:
        @staticmethod
        def leaky_relu(input, negative_slope):
            return "replaced"

    monkeypatch.setattr(subclasses, "F", Replaced)
    assert layer(torch.randn(4, CHANNELS, 3, 3)) == "replaced"


def test_a_check_of_dimensions_stays(plain_torch):
    class OneRow(nn.BatchNorm2d):
        def _check_input_dim(self, input):
            if input.shape[2] != 1:
                raise ValueError("one row, please")

    layer = convert_sync_batchnorm(OneRow(CHANNELS))
    assert layer(torch.randn(4, CHANNELS, 1, 5)).shape == (4, CHANNELS, 1, 5)
    with pytest.raises(ValueError, match="one row, please"):
        layer(torch.randn(4, CHANNELS, 2, 5))
    with pytest.raises(ValueError, match="expected 4D input"):
        convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS))(torch.randn(4, CHANNELS))
