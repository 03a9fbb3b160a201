"""SyncBN as a module: signature, state, options, copies."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

from triton_syncbn import SyncBN, ops, sync_batch_norm


def test_signature_is_that_of_torch():
    ours = inspect.signature(SyncBN.__init__).parameters
    theirs = inspect.signature(torch.nn.SyncBatchNorm.__init__).parameters
    known = {name: parameter for name, parameter in theirs.items() if name in ours}
    assert list(known) == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]
    assert [ours[name].kind for name in theirs] == [p.kind for p in theirs.values()]
    assert ours["bias"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_state_dict_is_that_of_torch(options):
    ours = SyncBN(4, **options)
    bias = options.get("bias", True)
    theirs = torch.nn.SyncBatchNorm(4, **{k: v for k, v in options.items() if k != "bias"})
    expected = theirs.state_dict()
    if not bias:
        del expected["bias"]
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {
        k: v.dtype for k, v in expected.items()
    }
    ours.load_state_dict(expected)
    assert isinstance(ours, torch.nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
    ],
    ids=str,
)
def test_one_process_trains_and_evaluates_as_batch_norm(options):
    torch.manual_seed(0)
    theirs = torch.nn.BatchNorm2d(3, **{k: v for k, v in options.items() if k != "bias"})
    ours = SyncBN(3, **options)
    for step in range(3):
        input = torch.randn(4, 3, 5, 6) * (step + 1) + step
        leaves = input.clone().requires_grad_(), input.clone().requires_grad_()
        outputs = ours(leaves[0]), theirs(leaves[1])
        torch.testing.assert_close(*outputs)
        grad = torch.randn_like(input)
        for output in outputs:
            output.backward(grad)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name])
    for parameter, name in ((ours.weight, "weight"), (ours.bias, "bias")):
        if parameter is not None:
            torch.testing.assert_close(
                parameter.grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-4
            )
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(input), theirs(input))


def test_bias_false_with_a_torch_that_does_not_know_it(monkeypatch):
    """Before `bias` came to torch, reset_parameters took a bias for granted."""

    def old_init(self, num_features, eps, momentum, affine, track_running_stats, device, dtype):
        torch.nn.Module.__init__(self)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, False
        self.weight = torch.nn.Parameter(torch.empty(num_features))
        self.bias = torch.nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    monkeypatch.setattr(torch.nn.modules.batchnorm._BatchNorm, "__init__", old_init)
    layer = SyncBN(4, bias=False)
    assert layer.bias is None
    layer.reset_parameters()
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert torch.equal(layer.weight, torch.ones(4))


def test_num_features_is_checked():
    with pytest.raises(ValueError, match=r"input: expected 4 channels .*got shape \(2, 3, 5\)"):
        SyncBN(4)(torch.randn(2, 3, 5))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_a_channel_in_one_process_is_an_error(shape):
    with pytest.raises(ValueError, match="input: expected more than one value per channel"):
        SyncBN(3)(torch.randn(shape))
    assert SyncBN(3).eval()(torch.randn(shape)).shape == shape


def test_without_running_statistics_eval_uses_the_batch():
    layer = SyncBN(3, track_running_stats=False).eval()
    input = torch.randn(4, 3, 5)
    torch.testing.assert_close(layer(input), F.batch_norm(input, None, None, training=True))


def test_momentum_none_averages_over_all_batches():
    layer = SyncBN(2, momentum=None)
    batches = [torch.randn(6, 2) + shift for shift in range(4)]
    for batch in batches:
        layer(batch)
    expected = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected)


def test_a_layer_that_stops_tracking_leaves_its_buffers():
    """In eval mode, as torch's, it uses them still; reset, it is as it was made."""
    ours, theirs = SyncBN(3), torch.nn.BatchNorm1d(3)
    for track in (True, False):
        for layer in (ours, theirs):
            layer.track_running_stats = track
        input = torch.randn(4, 3, 5) + 1.0
        torch.testing.assert_close(ours.train()(input), theirs.train()(input))
        torch.testing.assert_close(ours.eval()(input), theirs.eval()(input))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        assert ours.num_batches_tracked == 1
    ours.track_running_stats = True
    torch.nn.init.normal_(ours.weight), torch.nn.init.normal_(ours.bias)
    ours.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), SyncBN(3).state_dict(), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_input_and_layer_may_differ_in_dtype(dtype, training):
    input = torch.randn(4, 3, 5)
    for layer_dtype, input_dtype in (
        (dtype, torch.float32),
        (torch.float32, dtype),
        (dtype, dtype),
    ):
        layer = SyncBN(3, dtype=layer_dtype).train(training)
        output = layer(input.to(input_dtype).requires_grad_())
        output.sum().backward()
        assert output.dtype == input_dtype
        assert layer.weight.grad.dtype == layer_dtype


def test_other_strides_are_handled():
    wide = torch.randn(4, 12, 5, 6)
    for input in (wide[:, ::2], wide[:, :6], wide.transpose(2, 3)[:, :6], wide.flip(1)[:, 6:]):
        leaf = input.clone().requires_grad_()
        strided = input.detach().requires_grad_()
        grad = torch.randn(input.shape[::-1]).permute(3, 2, 1, 0)  # laid out unlike both
        SyncBN(6)(leaf).backward(grad)
        SyncBN(6)(strided).backward(grad)
        torch.testing.assert_close(strided.grad, leaf.grad)


def test_strided_parameters():
    input, weight, bias = torch.randn(4, 3, 5), torch.randn(3, 2), torch.randn(3, 4)
    actual = sync_batch_norm(input, None, None, weight[:, 1], bias[:, 2], training=True)
    expected = F.batch_norm(input, None, None, weight[:, 1], bias[:, 2], training=True)
    torch.testing.assert_close(actual, expected)


def test_an_expanded_gradient():
    """sum().backward() sends one number expanded over the whole map."""
    input = torch.randn(4, 3, 5, requires_grad=True)
    SyncBN(3)(input).sum().backward()
    assert input.grad.abs().max() < 1e-5  # the output's sum does not depend on the input


def test_under_autocast():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), SyncBN(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 2, 6, 6))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert model[1].weight.grad.dtype == torch.float32


def test_gradients_are_exact():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 2), (2,), (2,)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]

    def layer(input, weight, bias):
        return sync_batch_norm(input, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def gradient_penalty(rank, world_size, batches):
    input = batches[rank].clone().requires_grad_()
    output = sync_batch_norm(input, None, None, training=True)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), input, create_graph=True)
    grad.square().sum().backward()
    return input.grad


def test_second_derivatives_are_those_of_one_big_batch(ranks):
    batches = torch.randn(5, 3, 4, dtype=torch.float64).split([3, 2])
    grads = ranks.run(gradient_penalty, 2, batches)
    whole = torch.cat(batches).requires_grad_()
    output = F.batch_norm(whole, None, None, training=True)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), whole, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(torch.cat(grads), whole.grad)


def copies_of_a_layer_with_a_group(rank, world_size):
    layer = SyncBN(2, process_group=torch.distributed.new_group([0, 1]))
    layer.shares = {"weight": layer.weight}
    assert copy.copy(layer).process_group is layer.process_group
    duplicate = copy.deepcopy(layer)
    assert duplicate.process_group is layer.process_group
    assert duplicate.weight is not layer.weight
    assert duplicate.shares["weight"] is duplicate.weight
    unpickled = pickle.loads(pickle.dumps(layer))
    assert unpickled.process_group is None
    assert torch.equal(unpickled.weight, layer.weight)
    assert layer.process_group is not None
    torch.distributed.barrier()  # leave no rank that is still connecting to the group


def test_copies_and_pickles(reference_ranks):
    reference_ranks.run(copies_of_a_layer_with_a_group, 2)


def test_repr():
    assert repr(SyncBN(8)).startswith("SyncBN(8, eps=1e-05, momentum=0.1, affine=True")


def test_eval_looks_for_no_kernels(monkeypatch):
    """Which takes 0.2 s the first time, and a warning where there is no Triton."""
    monkeypatch.setattr(ops, "_steps_on", lambda device_type: pytest.fail("looked for kernels"))
    layer, x = SyncBN(4).eval(), torch.randn(2, 4, 3)
    assert torch.equal(layer(x), torch.nn.BatchNorm1d(4).eval()(x))
