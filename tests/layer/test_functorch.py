"""torch.func and forward-mode AD: what they give for one big batch, and errors where torch's batch
norm has them; operators that are not differentiable say so.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, ops, sync_batch_norm

INPUT = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = torch.stack([INPUT, INPUT.flip(0) * 2, INPUT.square(), INPUT.cos(), INPUT + 5])


def cubes(layer):
    return lambda input: layer(input).pow(3).sum()


def gradients_of_parameters(layer):
    state = dict(layer.named_parameters()), dict(layer.named_buffers())
    return grad(
        lambda weights: cubes(lambda x: functional_call(layer, (weights, state[1]), x))(INPUT)
    )(state[0])


TRANSFORMS = {
    "grad": lambda layer: grad(cubes(layer))(INPUT),
    "grad of parameters": gradients_of_parameters,
    "vjp": lambda layer: vjp(layer, INPUT)[1](INPUT.sin()),
    "jvp": lambda layer: jvp(layer, (INPUT,), (INPUT.sin(),)),
    "vmap": lambda layer: vmap(layer)(BATCHES),
    "vmap of the third dimension": lambda layer: vmap(layer, in_dims=2)(BATCHES.movedim(0, 2)),
    "vmap of grad": lambda layer: vmap(grad(cubes(layer)))(BATCHES),
    "jacrev": lambda layer: jacrev(layer)(INPUT),
    "jacfwd": lambda layer: jacfwd(layer)(INPUT),
    "hessian": lambda layer: hessian(cubes(layer))(INPUT),
}


def pair(**options):
    """A layer and torch's, with the same parameters."""
    ours = SyncBN(3, dtype=torch.float64, eps=0.01, **options)
    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64, eps=0.01, **options)
    if options.get("affine", True):
        torch.nn.init.uniform_(ours.weight)
        torch.nn.init.uniform_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_one_process_are_those_of_batch_norm(transform):
    ours, theirs = pair(track_running_stats=False)
    torch.testing.assert_close(transform(ours), transform(theirs))


@pytest.mark.parametrize("transform", [TRANSFORMS["vmap"], TRANSFORMS["vmap of grad"]])
def test_transforms_in_eval(transform):
    ours, theirs = pair()
    torch.testing.assert_close(transform(ours.eval()), transform(theirs.eval()))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_ensemble_trains_each_of_its_members(momentum):
    """Buffers that are arguments move, with a dimension to map over."""
    results = []
    for layer in pair(momentum=momentum):
        members = [copy.deepcopy(layer) for _ in range(3)]
        if momentum is None and isinstance(layer, torch.nn.BatchNorm2d):
            # torch reads the counter on the host, which vmap cannot
            for member, batch in zip(members, BATCHES, strict=False):
                member(batch)
            buffers = [torch.stack(b) for b in zip(*(m.buffers() for m in members), strict=True)]
            results.append([*buffers, *results[0][3:]])
            continue
        state = stack_module_state(members)

        def loss(weights, buffers, input, layer=layer):
            return cubes(lambda x: functional_call(layer, (weights, buffers), x))(input)

        grads = vmap(grad(loss))(*state, BATCHES[:3])
        results.append([*state[1].values(), *grads.values()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", [TRANSFORMS["grad"], TRANSFORMS["jvp"], TRANSFORMS["vmap"]])
def test_buffers_that_cannot_move_are_an_error(transform):
    """As with torch's batch norm, which words it less kindly."""
    ours, theirs = pair()
    with pytest.raises(
        RuntimeError, match=r"running_mean, running_var, num_batches_tracked: expec"
    ):
        transform(ours)
    with pytest.raises(RuntimeError):
        transform(theirs)
    assert ours.num_batches_tracked == 0
    assert torch.equal(ours.running_mean, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
def test_forward_mode(options):
    """Statistics move once, without a tangent."""
    results = []
    for layer in pair(**options):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(INPUT, INPUT.sin())
            results.append([*forward_ad.unpack_dual(layer(dual))])
            assert forward_ad.unpack_dual(layer.running_mean).tangent is None
        results[-1] += layer.buffers()
    torch.testing.assert_close(*results)


def test_forward_mode_is_exact():
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 2), 2, 2)
    ]

    def layer(input, weight, bias):
        return sync_batch_norm(input, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, inputs, check_fwd_over_rev=True)


def transforms_of_a_rank(rank, world_size, batches):
    """Of rank's share of a batch: results, and what each sends."""
    layer = SyncBN(3, affine=False, track_running_stats=False)
    input, tangent = batches[rank], batches[rank].sin()
    seen = {}
    for name, function in {
        "grad": lambda: grad(cubes(layer))(input),
        "jvp": lambda: jvp(layer, (input,), (tangent,))[1],
        "forward over reverse": lambda: jvp(grad(cubes(layer)), (input,), (tangent,))[1],
        "vmap of grad": lambda: vmap(grad(cubes(layer)))(torch.stack([input, input + tangent])),
    }.items():
        with counted_communication() as communication:
            result = function()
        seen[name] = result, communication
    return seen


def test_transforms_over_ranks_are_those_of_one_big_batch(reference_ranks):
    """One all_reduce for a value, one for each derivative of it."""
    batches = [INPUT[:1], INPUT[1:]]
    sums = [("all_reduce", (7,), torch.float64)]
    layer = torch.nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    tangent = INPUT.sin()
    expected = {
        "grad": (grad(cubes(layer))(INPUT), 2 * sums),
        "jvp": (jvp(layer, (INPUT,), (tangent,))[1], 2 * sums),
        "forward over reverse": (jvp(grad(cubes(layer)), (INPUT,), (tangent,))[1], 4 * sums),
        "vmap of grad": (
            vmap(grad(cubes(layer)))(torch.stack([INPUT, INPUT + tangent])),
            2 * [("all_reduce", (2, 7), torch.float64)],
        ),
    }
    first, second = reference_ranks.run(transforms_of_a_rank, 2, batches)
    for name, (result, communication) in expected.items():
        torch.testing.assert_close(torch.cat([first[name][0], second[name][0]], -4), result)
        assert first[name][1] == second[name][1] == communication, name


def call(name, leaf):
    """An operator, with a gradient asked of one of its inputs."""
    values = INPUT.float()
    moments = ops.moments(values)
    sums, *_ = ops.grad_moments(values, values, moments, None, None, 1e-5)
    return {
        "moments": lambda: ops.moments(leaf),
        "normalize": lambda: ops.normalize(leaf, moments, None, None, eps=1e-5),
        "grad_moments": lambda: ops.grad_moments(leaf, values, moments, None, None, 1e-5)[0],
        "grad_input": lambda: ops.grad_input(values, leaf, moments, sums, None, 1e-5),
    }[name]()


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("name", ["moments", "normalize", "grad_moments", "grad_input"])
def test_operators_say_that_they_are_not_differentiable(name, strided):
    leaf = INPUT.float().requires_grad_()
    output = call(name, leaf.flip(0).transpose(2, 3)[:, :, ::1] if strided else leaf)
    with pytest.raises(RuntimeError, match=f"triton_syncbn::{name} is not differentiable"):
        output.sum().backward()
    assert leaf.grad is None
    with torch.no_grad():
        assert not call(name, leaf).requires_grad
