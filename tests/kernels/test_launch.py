"""A launch past Triton is the launch that Triton makes: the same kernel, on the same arguments."""

import ast
import pathlib

import pytest

pytest.importorskip("triton")

from compiler.builds import compilers
from layers.steps import KERNELS

from tests.support import launches

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "kernels"
MOST_PARAMETERS = 8
# Of each kernel, some variations that Triton compiles another kernel for.
OTHER_KERNELS = {
    "moments": ["bfloat16", "channels last", "input beside"],
    "normalize": ["no weight", "weight torch.bfloat16", "running_var beside", "average", "relu"],
    "grad_moments": ["no bias", "bias torch.float64", "grad_output float64", "relu"],
    "grad_input": ["no weight", "weight torch.float64", "grad_moments beside", "relu"],
}


@pytest.fixture(scope="module")
def process():
    """One in which kernels are not interpreted."""
    with compilers(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def pairs(process):
    return process.submit(launches.pairs_of_variations, launches.CUDA).result()


def test_every_launch_is_that_of_triton(pairs):
    wrong = [key for key, found in pairs.items() if not all(pair.same for pair in found)]
    assert not wrong


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_kernel_is_launched_where_triton_compiles_one(kernel, pairs):
    """Else the test above would say little."""
    compiled = {
        variation: found[0].compiled
        for (name, variation), found in pairs.items()
        if name == kernel and found
    }
    assert compiled["other memory"] == compiled["base"]
    for variation in (*OTHER_KERNELS[kernel], "device"):
        assert compiled[variation] != compiled["base"], variation
    assert compiled["large"] != compiled["small"]  # offsets of 64 bits


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_a_launch_like_one_before_is_made_past_triton(kernel, pairs):
    """Where memory is aligned; other launches are made by Triton every time."""
    first, second, *_ = pairs[kernel, "base"]
    assert not first.past_triton
    assert second.past_triton
    assert all(pair.past_triton for pair in pairs[kernel, "other memory"])
    elsewhere = {
        where: pairs[kernel, where][0].past_triton for where in ("stream", "device", "back")
    }
    assert elsewhere == {"stream": True, "device": False, "back": True}
    for variation in OTHER_KERNELS[kernel]:
        answers = [pair.past_triton for pair in pairs[kernel, variation]]
        assert answers == ([False] * 4 if "beside" in variation else [False, True, True, True])


@pytest.mark.parametrize(
    "observed",
    [
        *("enter hook", "exit hook", "assigned hook", "debug", "instrumentation", "pre-run hook"),
        "unknown Triton",
    ],
)
def test_triton_launches_where_somebody_sees_it(observed, process):
    before, meanwhile, after = process.submit(launches.launches_past_triton, observed).result()
    assert before
    assert not meanwhile
    assert after


def test_triton_launches_on_gpus_whose_kernels_depend_on_more(process):
    """On the sizes of storages, of which nothing is kept."""
    pairs = process.submit(launches.pairs_of_variations, launches.HIP).result()
    assert not any(pair.past_triton for found in pairs.values() for pair in found)


def test_this_triton_is_known():
    """If not, launches take longer: read its JITFunction.run, and name it in kernels/launch.py."""
    from triton_syncbn.kernels import launch

    assert launch.IS_KNOWN


def test_functions_have_few_parameters():
    """Apart from those of a kernel that is launched: its tensors, sizes and constants."""
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                arguments = node.args
                named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                count = len(named) - (bool(named) and named[0].arg == "self")
                assert count <= MOST_PARAMETERS, f"{file.name}: {node.name}"
