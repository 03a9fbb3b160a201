"""torch.export: a layer that is exported in training trains, or it raises when it is exported."""

import copy

import pytest
import torch

from triton_syncbn import SyncBN, convert_sync_batchnorm


def batch_norm_and_ours(**options):
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.BatchNorm2d(3, **options)
    )
    return theirs, convert_sync_batchnorm(copy.deepcopy(theirs))


def step(model, input):
    """Gradients, and buffers with whether they ask for gradients."""
    model(input).pow(3).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    assert not any(buffer.requires_grad for buffer in model.buffers())
    return grads, buffers


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}],
    ids=str,
)
def test_an_exported_model_trains(options, strict, everywhere):
    theirs, ours = batch_norm_and_ours(**options)
    input = torch.randn(4, 3, 2, 2)
    exported = torch.export.export(ours, (input,), strict=strict).module()
    for _ in range(2):
        torch.testing.assert_close(step(exported, input), step(theirs, input), rtol=1e-4, atol=1e-5)


def test_an_exported_layer_is_batch_norm_to_tools():
    """So quantization-aware training finds what it folds."""
    _, ours = batch_norm_and_ours()
    graph = torch.export.export(ours, (torch.randn(4, 3, 2, 2),)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.add_.Tensor", "aten.batch_norm.default"]


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_eval_is_made_of_torch_operators(options, everywhere):
    theirs, ours = batch_norm_and_ours(**options)
    input = torch.randn(4, 3, 2, 2)
    program = torch.export.export(ours.eval(), (input,)).run_decompositions()
    names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert names and not any("triton_syncbn" in name for name in names)
    torch.testing.assert_close(program.module()(input), theirs.eval()(input))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_onnx(options, tmp_path):
    pytest.importorskip("onnxscript")
    _, ours = batch_norm_and_ours(**options)
    input = torch.randn(4, 3, 2, 2)
    torch.onnx.export(ours.eval(), (input,), tmp_path / "model.onnx", dynamo=True)
    assert (tmp_path / "model.onnx").stat().st_size > 0


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
@pytest.mark.filterwarnings("ignore")  # of the tracer, that it does not trace our checks
def test_traced_in_eval(options, tmp_path):
    """What ONNX's older exporter, too, starts from."""
    theirs, ours = batch_norm_and_ours(**options)
    input = torch.randn(4, 3, 2, 2)
    torch.jit.trace(ours.eval(), input).save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(input), theirs.eval()(input))


def export_over_ranks(rank, world_size):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), SyncBN(3))
    input = torch.randn(4, 3, 2, 2)
    for strict in (False, True):
        with pytest.raises(
            Exception, match=r"torch\.export: expected a layer in eval mode.*2 ranks"
        ):
            torch.export.export(model, (input,), strict=strict)
    exported = torch.export.export(model.eval(), (input,)).module()
    torch.testing.assert_close(exported(input), model(input))


def test_a_layer_that_communicates_raises_when_it_is_exported(reference_ranks):
    reference_ranks.run(export_over_ranks, 2)
