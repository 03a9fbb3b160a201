"""Compile every kernel for every architecture, with no GPU: registers, spills, shared memory and
the width of each access.

All layers of shapes.csv, dtypes, layouts and flags, or with --quick a few of them. Triton's wheel
carries the assembler and the tool that reads what it assembled. The exit status is 1 if a kernel
spills (but on sm75), takes more shared memory than there is, or accesses a map less wide than its
sizes allow.
"""

import argparse
import concurrent.futures
import os
import sys

import pandas as pd
from compiler.builds import Build, all_launches, build_all, compilers, faults, few_launches
from compiler.targets import ARCHITECTURES
from layers.cases import DTYPES
from tqdm import tqdm


def table(builds: list[Build]) -> str:
    """A line for each kernel, architecture and layout: the most registers and shared memory, and
    the widths of the accesses to maps; and the maps whose accesses are narrower than 16 bytes.
    """
    frame = pd.DataFrame(
        [
            {
                **build._asdict(),
                **build.case._asdict(),
                **build.resources._asdict(),
                "shape": build.case.shape_name,
                "width": "/".join(map(str, sorted(set().union(*build.widths.values()))))
                or "unknown",
            }
            for build in builds
        ]
    )
    reason = pd.Series("", frame.index)
    reason[frame.of_thread < frame.vector] = "fewer elements than a vector for each thread"
    bytes_wide = frame.vector * [DTYPES[name].itemsize for name in frame.dtype]
    reason[bytes_wide < 16] = "sizes that are no multiple of 16 bytes"
    lines = (
        frame[reason == ""]
        .groupby(["kernel", "architecture", "layout"])
        .agg(
            variants=("shape", "size"),
            registers=("registers", "max"),
            spilled=("spilled", "max"),
            shared_bytes=("shared_bytes", "max"),
            width=("width", lambda widths: " ".join(sorted(set(widths)))),
        )
    )
    narrow = frame.assign(reason=reason)[(reason != "") & (frame.width != "128")]
    shapes = narrow.groupby(["reason", "layout", "dtype"])["shape"].agg(
        lambda names: " ".join(sorted(set(names)))
    )
    parts = [lines.to_string()]
    if len(narrow):
        parts += [
            "Maps that are accessed less than 16 bytes at a time:",
            shapes.to_frame().to_string(),
        ]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Compile for the architectures asked for; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few maps, dtypes and flags")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    options = parser.parse_args(arguments)
    builds: list[Build] = []
    with compilers(options.jobs) as executor:
        work = [
            executor.submit(build_all, name, launches)
            for name in options.architecture
            for launches in ([few_launches()] if options.quick else map(all_launches, DTYPES))
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
