"""The essentials of the suite on other versions of Triton and torch: `make versions`.

Each version is installed into a folder of its own, build/versions/<name>, which is looked into
before the packages of this Python. What a version of Triton needs beside itself is in
pyproject.toml, in its dependency group. A torch is a build for CPUs, of the index that pip is given
or of PyTorch's own. One line a version; what pytest says lies beside the folders.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "versions"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
ESSENTIALS = ["tests/kernels", "tests/layer", "-m", "not slow"]
# Without what they need: Triton needs nothing, and torch nothing that this Python lacks.
INSTALL = ("-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:")
VERSIONS = """
import numpy, platform, torch, triton
print(f"triton {triton.__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
      f"Python {platform.python_version()}")
"""


class Environment(NamedTuple):
    """A Python and the folders that it looks into first."""

    name: str
    python: str
    folders: tuple[pathlib.Path, ...] = ()

    def run(self, *arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
        paths = [str(folder) for folder in (*self.folders, ROOT)]
        return subprocess.run(
            [self.python, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            **how,
        )


def installed(name: str, requirements: list[str], *options: str) -> pathlib.Path:
    """The folder with these requirements, made if it is not there."""
    folder, done = FOLDER / name, FOLDER / name / "installed"
    if not done.is_file() or done.read_text().split("\n") != requirements:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, *INSTALL, "--target", str(folder), *options, *requirements]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        done.write_text("\n".join(requirements))
    return folder


def environments(options: argparse.Namespace) -> Iterator[tuple[str, Environment | str]]:
    """A name and its environment, or why there is none."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    wanted: dict[str, tuple[list[str], tuple[str, ...]]] = {}
    for version in options.triton or [name.removeprefix("triton-") for name in groups]:
        wanted[f"triton-{version}"] = (groups[f"triton-{version}"], ())
    for version in options.torch:
        requirement = f"torch=={version}+cpu"
        wanted[f"torch-{version}"] = ([requirement], ("--extra-index-url", CPU_BUILDS))
    for name, (requirements, more) in wanted.items():
        try:
            folder = installed(name, requirements, *more)
        except subprocess.CalledProcessError as error:
            yield name, error.stderr.strip().splitlines()[-1]
            continue
        yield name, Environment(name, sys.executable, (folder,))
    for number, python in enumerate(options.python):
        # pytest is brought along, so that such an environment stays as it is
        tools = ["pytest", "pytest-timeout", "pytest-xdist", "execnet", "hypothesis"]
        tools += ["iniconfig", "packaging", "pluggy", "pygments", "sortedcontainers"]
        constraints = ("--constraint", str(ROOT / "constraints.txt"))
        folder = installed("tools", tools, *constraints)
        yield python, Environment(f"python-{number}", python, (folder,))


def outcome(environment: Environment, arguments: list[str]) -> tuple[str, bool]:
    """What became of the tests in an environment, and whether all is well."""
    versions = environment.run("-c", VERSIONS, capture_output=True)
    if versions.returncode:
        return versions.stderr.strip().splitlines()[-1], False
    report, log = (FOLDER / f"{environment.name}{suffix}" for suffix in (".xml", ".log"))
    report.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        command = ("-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *arguments)
        done = environment.run(*command, f"--junitxml={report}", stdout=output, stderr=output)
    seconds = time.monotonic() - start
    if not report.is_file():
        return f"{versions.stdout.strip()}: no test has run, see {log}", False
    suite = next(ElementTree.parse(report).iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    line = f"{versions.stdout.strip()}: {passed} passed, {failed} failed, {seconds:.0f} s"
    return line, done.returncode == 0 and passed > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--triton", nargs="*", help="versions such as 3.9; all that are declared")
    parser.add_argument("--torch", nargs="*", default=[], help="versions such as 2.12.0")
    parser.add_argument("--python", nargs="*", default=[], help="of environments that are there")
    parser.add_argument("--tests", nargs="*", default=ESSENTIALS, help="what pytest is given")
    options, more = parser.parse_known_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    all_well = True
    for name, environment in environments(options):
        well = False
        if isinstance(environment, Environment):
            line, well = outcome(environment, [*options.tests, *more])
        else:
            line = f"none: {environment}"
        print(f"{name:12} {line}", flush=True)
        all_well &= well
    return not all_well


if __name__ == "__main__":
    raise SystemExit(main())
