"""The operators under torch's own tools: opcheck, fake tensors, torch.compile."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ranks import counted_communication
from triton_syncbn import SyncBN, ops, sync_batch_norm


def arguments(layout=torch.contiguous_format, dtype=torch.float32):
    input = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=layout)
    grad_output = torch.randn_like(input)
    moments = ops.moments(input)
    weight, bias = torch.rand(2, 3)
    sums, *_ = ops.grad_moments(grad_output, input, moments, torch.float32, None, 1e-5)
    return {
        "moments": (input,),
        "moments_block": (input,),
        "normalize": (input, moments, weight, bias),
        "grad_moments": (grad_output, input, moments, torch.float32, torch.float64, 1e-5),
        "grad_input": (grad_output, input, moments, sums, weight, 1e-5),
        "normalize_block": (input, moments, weight, bias),
        "grad_input_block": (grad_output, input, moments, sums, weight, 1e-5),
    }


NAMES = [
    "moments",
    "moments_block",
    "normalize",
    "normalize_block",
    "grad_moments",
    "grad_input",
    "grad_input_block",
]


def settings(name):
    if name == "normalize_block":
        block = {"residual": torch.randn(2, 3, 4, 5), "activation": "relu", "keeps_gates": True}
        return {"eps": 1e-5, **block}
    if name == "grad_input_block":
        return {"bias": torch.rand(3), "activation": "silu", "residual": torch.randn(2, 3, 4, 5)}
    if name != "normalize":
        return {}
    return {
        "running_mean": torch.rand(3),
        "running_var": torch.rand(3),
        "num_batches_tracked": torch.tensor(0),
        "momentum": None,
        "eps": 1e-5,
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_schema_and_shapes_hold(name, layout):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(ops, name), arguments(layout, dtype)[name], settings(name))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_strided_input(name):
    """The fake implementation promises the memory layout that the real one returns."""
    values = list(arguments()[name])
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            values[index] = torch.randn(2, 6, 4, 5)[:, ::2]
    real = getattr(ops, name)(*values, **settings(name))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values]
        buffers = {
            key: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for key, v in settings(name).items()
        }
        fake = getattr(ops, name)(*fakes, **buffers)
    for one, other in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True
    ):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def called(monkeypatch):
    """The steps that went through an operator."""
    names = []

    def noting(name, step):
        def run(*arguments, **settings):
            names.append(name)
            return step(*arguments, **settings)

        return run

    steps = zip(ops.Steps._fields, ops.OPERATORS, strict=True)
    monkeypatch.setattr(ops, "OPERATORS", ops.Steps(*(noting(*step) for step in steps)))
    return names


def train(weight=None, **block):
    """One training step; what came out."""
    generator = torch.Generator().manual_seed(0)
    input, grad_output = torch.randn(2, 4, 3, 5, 5, generator=generator)
    leaf = input.requires_grad_()
    weight = torch.ones(3) if weight is None else weight
    output = sync_batch_norm(leaf, torch.zeros(3), torch.ones(3), weight, None, True, **block)
    return output.detach(), torch.autograd.grad(output, leaf, grad_output)[0]


@pytest.mark.parametrize("block", [{}, {"activation": "relu"}], ids=["layer", "block"])
@pytest.mark.parametrize(
    "watch",
    [
        *(contextlib.nullcontext, SeesOperators, SeesFunctions),
        *(torch.autograd.profiler.profile, torch.profiler.profile),
    ],
)
def test_steps_go_through_the_operators_where_torch_sees_them(watch, block, called, plain_torch):
    """And past them, with the same result, where nothing does."""
    expected = train(**block)
    assert called == []
    with watch():
        results = train(**block)
    suffix = "_block" if block else ""
    steps = [name + suffix for name in ("moments", "normalize", "grad_moments", "grad_input")]
    if watch is contextlib.nullcontext:
        steps = []
    if watch is SeesFunctions:
        steps = steps[:2]  # torch turns it off in a backward
    assert called == steps
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_other_kinds_of_tensors_go_through_the_operators(called, plain_torch):
    train(torch.ones(3).as_subclass(Subclass))
    assert called == ["moments", "normalize", "grad_moments", "grad_input"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operators(plain_torch):
    traced = torch.jit.trace(SyncBN(3), torch.randn(2, 3, 4), check_trace=False)
    graph = str(traced.inlined_graph)
    assert "triton_syncbn::moments" in graph
    assert "triton_syncbn::normalize" in graph


def compiled_and_eager(rank, world_size):
    """One training step of a small model, eager and compiled as one graph."""
    torch.manual_seed(rank)
    input = torch.randn(2 + rank, 3, 6, 6)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        group = dist.new_group(list(range(world_size)))
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            SyncBN(4),
            torch.nn.ReLU(),
            SyncBN(4, momentum=None, process_group=group),
        )
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        leaf = input.clone().requires_grad_()
        step(leaf).square().sum().backward()
        results.append(
            [
                leaf.grad,
                *(p.grad for p in model.parameters()),
                *(b.clone() for b in model.buffers()),
            ]
        )
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_compiles_as_one_graph(world_size, reference_ranks):
    reference_ranks.run(compiled_and_eager, world_size)


def test_one_graph_serves_all_shapes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = SyncBN(3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples, size in ((2, 6), (3, 7), (5, 9)):
        input = torch.randn(samples, 3, size, size + 1)
        torch.testing.assert_close(compiled(input), layer(input))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_communication_is_recorded_by_the_tests(reference_ranks):
    """The counter of communication sees calls; without this a broken counter would pass tests."""
    ((first, second),) = reference_ranks.run(communicate_twice, 1)
    assert first == ("all_reduce", (2,), torch.float32)
    assert second[0] == "broadcast"


def communicate_twice(rank, world_size):
    with counted_communication() as seen:
        dist.all_reduce(torch.ones(2))
        dist.broadcast(torch.ones(3), 0)
    return seen
