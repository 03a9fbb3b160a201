"""Activation checkpointing: statistics move once, gradients are those of the plain step to the last
bit, and with `checkpoint_contexts` nothing is sent twice.
"""

import functools
import gc
import warnings
import weakref
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, checkpoint_contexts, function
from triton_syncbn.checkpointing import keep_sums

CHANNELS = 4
FORWARD = ("all_reduce", (2 * CHANNELS + 1,), torch.float64)
BACKWARD = ("all_reduce", (2 * CHANNELS,), torch.float64)


def save_everything(context, operator, *arguments, **keywords):
    return CheckpointPolicy.MUST_SAVE


def selective(policy):
    return functools.partial(create_selective_checkpoint_contexts, policy)


reentrant = functools.partial(checkpoint, use_reentrant=True)
anew = functools.partial(checkpoint, use_reentrant=False)
once = functools.partial(anew, context_fn=checkpoint_contexts)


def nested(form, model, input):
    return form(lambda input: form(model[3:], form(model[:3], input)), input)


# Each form: how the model is run, and how many forwards of its two layers are sent in backward.
FORMS = {
    "reentrant": (lambda model, input: reentrant(model, input), 2),
    "not reentrant": (lambda model, input: anew(model, input), 2),
    "once": (lambda model, input: once(model, input), 0),
    "everything saved": (
        lambda model, input: anew(model, input, context_fn=selective(save_everything)),
        0,
    ),
    "sums saved": (
        lambda model, input: anew(
            model, input, context_fn=selective([torch.ops.triton_syncbn.all_reduce.default])
        ),
        0,
    ),
    # the outer region runs the first inner one again, to find the input of the second
    "nested, reentrant": (functools.partial(nested, reentrant), 4),
    "nested": (functools.partial(nested, anew), 3),
    "nested, once": (functools.partial(nested, once), 0),
}


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, CHANNELS, 3),
        SyncBN(CHANNELS),
        torch.nn.ReLU(),
        torch.nn.Conv2d(CHANNELS, CHANNELS, 3),
        SyncBN(CHANNELS, momentum=None),
        torch.nn.Sigmoid(),
    )


def uneven_input(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + rank, 3, 5, 5, generator=generator).requires_grad_()


def everything(model, *inputs):
    """Gradients and buffers after a step."""
    return [
        *(input.grad for input in inputs),
        *(parameter.grad for parameter in model.parameters()),
        *(buffer.clone() for buffer in model.buffers()),
    ]


def steps_in_all_forms(rank, world_size):
    """What forward and backward send, and what they leave, plainly and in each form."""
    plain = small_model()
    input = uneven_input(rank)
    plain(input).square().sum().backward()
    expected = everything(plain, input)
    seen = {}
    for name, (form, _) in FORMS.items():
        model = small_model()
        input = uneven_input(rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested and reentrant: inputs without gradients
            with counted_communication() as forward:
                output = form(model, input)
            with counted_communication() as backward:
                output.square().sum().backward()
        identical = map(torch.equal, everything(model, input), expected)
        counters = [int(model[index].num_batches_tracked) for index in (1, 4)]
        seen[name] = (forward, backward, all(identical), counters)
    return seen


def test_a_checkpointed_step_is_the_plain_step(ranks):
    for seen in ranks.run(steps_in_all_forms, 2):
        for name, (forward, backward, identical, counters) in seen.items():
            again = FORMS[name][1]
            assert forward == [FORWARD] * 2, name
            assert sorted(backward) == sorted([FORWARD] * again + [BACKWARD] * 2), name
            assert identical, name
            assert counters == [1, 1], name


def several_forwards_in_a_step(rank, world_size):
    """One layer runs three times, each time in a region of its own, before one backward."""
    results = []
    for run in (torch.nn.Module.__call__, reentrant, anew, once):
        layer = SyncBN(3)
        inputs = [uneven_input(rank + 10 * call) for call in range(2)]
        with counted_communication() as seen:
            sum(run(layer, input).pow(3).sum() for input in inputs).backward()
        results.append(everything(layer, *inputs))
        assert layer.num_batches_tracked == 2
        assert len(seen) == (6 if run in (reentrant, anew) else 4)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_several_forwards_find_their_own_sums(ranks):
    ranks.run(several_forwards_in_a_step, 2)


class Checkpointed(torch.nn.Module):
    """A block that checkpoints what it holds."""

    def __init__(self, run, body):
        super().__init__()
        self.run, self.body = run, body

    def forward(self, input):
        return self.run(self.body, input)


def wrapped_in_ddp(rank, world_size):
    results = []
    for run in (torch.nn.Module.__call__, reentrant, anew, once):
        model = Checkpointed(run, small_model())
        # of a reentrant checkpoint, DDP asks for a static graph and gradients of the input
        ddp = DistributedDataParallel(model, static_graph=run is reentrant)
        for _ in range(2):
            ddp.zero_grad()
            ddp(uneven_input(rank)).square().sum().backward()
        results.append(everything(model.body))
        assert [int(model.body[index].num_batches_tracked) for index in (1, 4)] == [2, 2]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_under_ddp(ranks):
    ranks.run(wrapped_in_ddp, 2)


def backward_twice(rank, world_size):
    """A graph that is kept is computed again for each backward."""
    model, input = small_model(), uneven_input(rank)
    output = once(model, input).square().sum()
    output.backward(retain_graph=True)
    first = input.grad.clone()
    with counted_communication() as seen:
        output.backward()
    assert torch.equal(input.grad, 2 * first)
    assert seen == [BACKWARD] * 2
    assert model[1].num_batches_tracked == 1


def test_a_second_backward(reference_ranks):
    reference_ranks.run(backward_twice, 2)


def another_order(rank, world_size):
    first, second = SyncBN(3), SyncBN(3)
    first.layer_name, second.layer_name = "first", "second"
    layers = [first, second]

    def run_and_swap(input):
        output = layers[1](layers[0](input))
        layers.reverse()
        return output

    output = once(run_and_swap, uneven_input(rank))
    with pytest.raises(RuntimeError, match=r"number 0 was 'first', is 'second'"):
        output.sum().backward()


def test_layers_in_another_order_are_an_error(reference_ranks):
    reference_ranks.run(another_order, 2)


def forwards_without_backward(rank, world_size):
    """The sums that a region keeps go with its graph."""
    kept = []

    def note(sums, layer_name):
        kept.append(weakref.ref(sums))
        keep_sums(sums, layer_name)

    with mock.patch.object(function, "keep_sums", note):
        output = once(small_model(), uneven_input(rank))
    assert len(kept) == 2 and all(reference() is not None for reference in kept)
    del output
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_sums_go_with_the_graph(reference_ranks):
    reference_ranks.run(forwards_without_backward, 2)


def compiled_forms(rank, world_size):
    """A compiled block in a checkpoint, and a checkpoint in a compiled graph."""

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    forms = {
        "plain": lambda model, input: model(input),
        "inside": lambda model, input: anew(compiled(model), input),
        "outside": lambda model, input: compiled(functools.partial(anew, model))(input),
        "outside, once": lambda model, input: compiled(functools.partial(once, model))(input),
    }
    seen = {}
    for name, form in forms.items():
        model, input = small_model(), uneven_input(rank)
        with torch.profiler.profile() as forward:
            output = form(model, input)
        with torch.profiler.profile() as backward:
            output.square().sum().backward()
        counts = [
            sum(event.name == "c10d::allreduce_" for event in profile.events())
            for profile in (forward, backward)
        ]
        seen[name] = counts, everything(model, input)
    return seen


@pytest.mark.filterwarnings("ignore")
def test_compiled(reference_ranks):
    for seen in reference_ranks.run(compiled_forms, 2):
        counts = {name: count for name, (count, _) in seen.items()}
        assert counts.pop("outside") in ([2, 4], [2, 2])  # torch 2.11 keeps what was sent unasked
        assert counts == {"plain": [2, 2], "inside": [2, 4], "outside, once": [2, 2]}
        for _, result in seen.values():
            torch.testing.assert_close(result, seen["plain"][1], rtol=1e-5, atol=1e-6)
            assert torch.equal(result[-1], torch.tensor(1))  # batches counted


@pytest.mark.parametrize("run", [reentrant, anew, once], ids=["reentrant", "anew", "once"])
def test_one_process_counts_once(run):
    layer = SyncBN(3)
    run(layer, uneven_input(0)).sum().backward()
    assert layer.num_batches_tracked == 1
