"""The package as users get it: from a checkout, from a wheel, without Triton."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = "kernels/configs/Some_GPU.json"  # as perf/tune.py writes one

USE = """
import importlib.util, sys
import torch, triton_syncbn
assert "triton" not in sys.modules, "importing the package imported Triton"
layer = triton_syncbn.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))
layer(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
print(triton_syncbn.__file__)
if importlib.util.find_spec("triton"):
    from triton_syncbn.kernels import moments
    print(moments.__file__)
assert {kernels} == bool(importlib.util.find_spec("kernels"))
"""


def python(*arguments: str, cwd: pathlib.Path, **environment: str) -> str:
    """What a fresh Python prints, isolated from this checkout and its tests' environment."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_bare_checkout(tmp_path):
    """With nothing installed: only the two folders, side by side."""
    for folder in ("triton_syncbn", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    script = tmp_path / "use.py"
    script.write_text(USE.format(kernels=True))
    module, kernels = python(str(script), cwd=tmp_path).split()
    assert pathlib.Path(module) == tmp_path / "triton_syncbn" / "__init__.py"
    assert pathlib.Path(kernels) == tmp_path / "kernels" / "moments.py"


def test_from_an_editable_installation(tmp_path):
    try:
        importlib.metadata.distribution("triton-syncbn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed; `make test` installs it")
    script = tmp_path / "use.py"
    script.write_text(USE.format(kernels=False))
    module, kernels = python(str(script), cwd=tmp_path).split()
    assert pathlib.Path(module) == ROOT / "triton_syncbn" / "__init__.py"
    assert pathlib.Path(kernels) == ROOT / "kernels" / "moments.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """A wheel built from the files of this checkout, and the configs of one more GPU."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("triton_syncbn", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    (source / CONFIGS).parent.mkdir(exist_ok=True)
    (source / CONFIGS).write_text("{}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    python(
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--wheel-dir", str(target), str(source)),
        cwd=source,
    )
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "triton_syncbn/kernels/moments.py" in names
    assert "triton_syncbn/py.typed" in names
    assert f"triton_syncbn/{CONFIGS}" in names
    shipped = (ROOT / "kernels" / "configs").glob("*.json")
    assert {f"triton_syncbn/kernels/configs/{file.name}" for file in shipped} <= set(names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"triton_syncbn"}


def test_the_wheel_installed_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    python(
        *("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)),
        cwd=tmp_path,
    )
    script = tmp_path / "use.py"
    script.write_text(USE.format(kernels=False))
    module, kernels = python(str(script), cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert (pathlib.Path(kernels).parent / "configs" / "Some_GPU.json").is_file()
    assert pathlib.Path(module) == site / "triton_syncbn" / "__init__.py"
    assert pathlib.Path(kernels) == site / "triton_syncbn" / "kernels" / "moments.py"


def test_without_triton(tmp_path):
    """A machine without Triton imports and trains; the layer runs in plain torch, and says so on a
    GPU.
    """
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        "raise ModuleNotFoundError('no', name='triton')"
    )
    script = tmp_path / "use.py"
    script.write_text(
        """
import warnings
import torch, triton_syncbn
from triton_syncbn import ops, reference
triton_syncbn.SyncBN(3)(torch.randn(2, 3, 4, requires_grad=True)).sum().backward()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert ops._backend("cuda") is reference
assert "Triton is not installed" in str(caught[0].message)
"""
    )
    python(str(script), cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
