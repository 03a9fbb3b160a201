"""Compile what layers launch on a GPU, on a machine without one, for one that is lent for minutes.

    python perf/compile_ahead.py --out cache --at FOLDER   # here; then it is moved to FOLDER there
    TRITON_CACHE_DIR=FOLDER make gpu OUT=results           # there

Triton finds there what was compiled here if its wheel is the same in both places. Compiled are the
layers of shapes.csv alone, with ReLU, and with an add and ReLU; with --tune all candidates, too.
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from compiler.builds import compilers, config_of
from compiler.compiling import Flags, compile_kernel, operands_without_memory
from compiler.targets import ARCHITECTURES
from layers.cases import DTYPES, LAYOUTS, Case, read_cases, suites
from layers.steps import KERNELS
from tqdm import tqdm
from triton_syncbn.kernels.indexing import geometry
from triton_syncbn.kernels.launch_config import WRITERS, LaunchConfig, tiling
from tuning.candidates import candidates, jobs_of

BLOCKS = (Flags(), Flags(activation="relu"), Flags(activation="relu", residual=True))


class Launch(NamedTuple):
    """What is compiled."""

    kernel: str
    case: Case
    flags: Flags
    config: LaunchConfig


def launches(cases: list[Case], multiprocessors: int, tune: bool) -> list[Launch]:
    """Of all launches one for each kernel that is compiled otherwise."""
    different: dict[Any, Launch] = {}
    for launch in _all_launches(cases, multiprocessors, tune):
        input = launch.case.without_memory()
        shape = geometry(input)
        walk = tiling(shape, launch.config, input.dtype, writes_map=launch.kernel in WRITERS)
        gates = launch.flags.residual and (shape.vector % 8 == 0, input.numel() % 8 == 0)
        key = launch.kernel, launch.case.dtype, launch.flags, gates, walk, launch.config.num_warps
        different.setdefault(key, launch)
    return list(different.values())


def _all_launches(cases: list[Case], multiprocessors: int, tune: bool) -> Iterator[Launch]:
    for case, kernel in itertools.product(cases, KERNELS):
        for flags in BLOCKS[:1] if kernel == "moments" else BLOCKS:
            yield Launch(kernel, case, flags, config_of(kernel, case, flags, multiprocessors))
    for job in jobs_of(cases, KERNELS) if tune else ():
        for config in candidates(job, multiprocessors):
            yield Launch(job.bucket.kernel, job.case, BLOCKS[0], config)


def compile_launch(launch: Launch, architecture: str) -> None:
    """Compile one, into TRITON_CACHE_DIR."""
    operands = operands_without_memory(launch.case.without_memory(), launch.flags)
    compile_kernel(launch.kernel, operands, launch.config, ARCHITECTURES[architecture].target)


def keep(compiled: pathlib.Path, out: pathlib.Path, at: pathlib.Path) -> int:
    """Copy of what Triton wrote what it needs to launch, with the paths of the place where it will
    lie. Returns how many kernels there are.
    """
    groups = sorted(compiled.glob("*/__grp__*.json"))
    for group in groups:
        folder = out / group.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        names = json.loads(group.read_text())["child_paths"]
        needed = [name for name in names if name.endswith((".cubin", ".hsaco", ".json"))]
        for name in needed:
            shutil.copy(group.parent / name, folder)
        paths = {name: str(at / folder.name / name) for name in needed}
        (folder / group.name).write_text(json.dumps({"child_paths": paths}))
    return len(groups)


def main(arguments: list[str] | None = None) -> int:
    """Compile them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--at", type=pathlib.Path, required=True, metavar="DIR", help="there")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sm90")
    parser.add_argument("--tune", action="store_true", help="what `make tune` tries, too")
    parser.add_argument("--suite", nargs="+", choices=suites(), default=suites())
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    options = parser.parse_args(arguments)
    cases = read_cases(options.suite, options.dtype, list(LAYOUTS))
    multiprocessors = ARCHITECTURES[options.architecture].multiprocessors
    wanted = launches(cases, multiprocessors, options.tune)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        compilers(os.cpu_count() or 1) as executor,
    ):
        done = executor.map(compile_launch, wanted, itertools.repeat(options.architecture))
        for _ in tqdm(done, total=len(wanted), unit="kernel", dynamic_ncols=True):
            pass
        kernels = keep(pathlib.Path(folder), options.out, options.at)
    print(f"{kernels} kernels for {options.architecture} in {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
