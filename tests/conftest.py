"""Set-up of all tests. With no GPU the kernels run in Triton's interpreter, on CPU tensors."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # Not the cache of earlier versions: inductor finds what it keeps by a graph that names our
    # operators, whatever shapes they return by now.
    _inductor_cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name

from tests.support import interpreter
from tests.support.ranks import Ranks, fill_empty_tensors, pool

torch.set_num_threads(1)
fill_empty_tensors()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-steps", type=int, default=12, help="steps of tests/layer/test_soak.py")
    parser.addoption("--drawn", type=int, default=12, help="cases of tests/layer/test_accuracy.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw so many examples."""
    if "drawn" in metafunc.fixturenames:
        metafunc.parametrize("drawn", range(metafunc.config.getoption("--drawn")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU unless `-m` names that marker, whatever else it asks for."""
    if "gpu" not in config.option.markexpr:
        config.hook.pytest_deselected(
            items=[item for item in items if item.get_closest_marker("gpu")]
        )
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
            id="interpreter",
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: interpreted on CPU tensors, or on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture
def undefined_masked_lanes() -> Iterator[None]:
    """Lanes that a mask keeps from loading hold NaN in the interpreter; on a GPU, anything."""
    with interpreter.undefined_masked_lanes() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def reference_ranks() -> Ranks:
    """Processes whose layer runs in plain torch."""
    with pool(TRITON_INTERPRET="0") as ranks:
        yield ranks


@pytest.fixture(scope="session")
def kernel_ranks() -> Ranks:
    """Processes whose layer runs the interpreted kernels."""
    with pool(TRITON_INTERPRET="1") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def mortal_ranks() -> Ranks:
    """Processes of which a test may kill some."""
    with pool(TRITON_INTERPRET="0") as ranks:
        yield ranks


@pytest.fixture(params=["reference", "kernels"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Processes whose layer runs in plain torch; and then processes where it runs the kernels."""
    return request.getfixturevalue(
        "reference_ranks" if request.param == "reference" else "kernel_ranks"
    )


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process computes as users' do: without the interpreter, which is a thousand times
    slower, and without a GPU.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from triton_syncbn import ops

    caches = ops._backend, ops._steps_on
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=["kernels", "plain torch"])
def everywhere(request: pytest.FixtureRequest) -> None:
    """This process with the kernels in the interpreter, and as users' without a GPU."""
    if request.param == "plain torch":
        request.getfixturevalue("plain_torch")


@pytest.fixture
def one_rank(tmp_path: pathlib.Path, plain_torch: None) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
