"""Compile every kernel for every architecture, with no GPU: registers, spills, shared memory and
the width of each access.

All layers of shapes.csv, dtypes, layouts and flags. Triton's wheel carries the assembler and the
tool that reads what it assembled. The exit status is 1 if a kernel spills (but on sm75), takes more
shared memory than there is, or accesses a map less wide than its sizes allow.
"""

import argparse
import concurrent.futures
import itertools
import os
import sys

import pandas as pd
from compiler.builds import Build, all_launches, build_all, compilers, faults
from compiler.targets import ARCHITECTURES
from layers.cases import DTYPES
from tqdm import tqdm


def table(builds: list[Build]) -> str:
    """A line for each kernel, architecture and layout: variants, the most that they take, and the
    least bits of an access to a map (of odd sizes; on AMD it is not known).
    """
    frame = pd.DataFrame(
        {
            **{"kernel": build.kernel, "architecture": build.architecture},
            "layout": build.case.layout,
            **build.resources._asdict(),
            "narrowest": min(itertools.chain(*build.widths.values()), default=None),
        }
        for build in builds
    )
    groups = frame.groupby(["kernel", "architecture", "layout"])
    lines = groups[["registers", "spilled", "shared_bytes"]].max()
    return lines.assign(narrowest=groups.narrowest.min(), variants=groups.size()).to_string()


def main(arguments: list[str] | None = None) -> int:
    """Compile for the architectures asked for; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    options = parser.parse_args(arguments)
    builds: list[Build] = []
    with compilers(os.cpu_count() or 1) as executor:
        work = [
            executor.submit(build_all, name, launches)
            for name in options.architecture
            for launches in map(all_launches, DTYPES)
        ]
        for done in tqdm(concurrent.futures.as_completed(work), total=len(work)):
            builds += done.result()
    print(table(builds))
    wrong = [(build, found) for build in builds if (found := faults(build))]
    for build, found in wrong:
        print(
            f"FAIL: {build.kernel} on {build.architecture}, {build.case.layout} "
            f"{build.case.dtype} {build.case.shape_name}: {'; '.join(found)}"
        )
    print(f"{len(builds)} kernels, {len(wrong)} of them wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
