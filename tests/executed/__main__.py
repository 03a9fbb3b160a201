"""Execute what the compiler made of the kernels, for every architecture, with no GPU.

python -m tests.executed                   all variants on all architectures: many minutes
python -m tests.executed --architecture 90 --few
python -m tests.executed --mutations 100   change compiled kernels: is it noticed?
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import sys
import time

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton
sys.path.append(str(pathlib.Path(__file__).parents[2] / "perf"))  # where the executor is

from tqdm import tqdm

from .variants import (
    ARCHITECTURES,
    MUTATED,
    all_variants,
    few_variants,
)
from .workers import Outcome, Trial, execute, mutate, workers

AT_ONCE = 2  # variants that a process takes


def report(outcomes: list[Outcome], seconds: float) -> int:
    """Print what was executed, what is wrong, and the largest errors; the number of faults."""
    wrong = [(outcome, text) for outcome in outcomes for text in outcome.complaints()]
    for outcome, text in wrong:
        print(f"FAIL: sm{outcome.capability} {outcome.variant} seed={outcome.seed}: {text}")
    worst: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    identical: dict[tuple[str, str, str], int] = collections.Counter()
    for outcome in outcomes:
        for error in outcome.errors:
            key = error.kernel, error.what, error.dtype
            worst[key].append(error.error)
            identical[key] += error.identical
    print(f"{'kernel':14}{'written':22}{'dtype':10}{'runs':>6}{'identical':>11}{'worst':>9}")
    for key, values in sorted(worst.items()):
        kernel, what, dtype = key
        print(f"{kernel:14}{what:22}{dtype:10}{len(values):6}{identical[key]:11}{max(values):9.3g}")
    print(
        "worst: of maps and buffers up to float32, floats apart; else, in units of what is allowed"
    )
    for capability in sorted({outcome.capability for outcome in outcomes}):
        those = [outcome for outcome in outcomes if outcome.capability == capability]
        kernels = frozenset().union(*(outcome.kernels for outcome in those))
        print(
            f"sm{capability}: {len({o.variant for o in those})} variants, {len(kernels)} different "
            f"kernels, {len(those)} runs"
        )
    launches = sum(outcome.launches for outcome in outcomes)
    repeated = sum(outcome.repeated for outcome in outcomes)
    print(
        f"{launches} launches; {repeated} of them were not executed again: their PTX, but for the "
        "architecture's name, and all that it reads were those of another"
    )
    print(f"{len(wrong)} mismatches, {seconds:.0f} s")
    return len(wrong)


def report_mutations(trials: list[Trial]) -> None:
    """Print how many changes were noticed, and those that were not."""
    for name, those in (
        ("barriers left out", [trial for trial in trials if trial.barrier]),
        ("  of several warps", [trial for trial in trials if trial.barrier and trial.warps > 1]),
        ("other changes", [trial for trial in trials if not trial.barrier]),
    ):
        print(f"{name}: {sum(bool(trial.noticed) for trial in those)} of {len(those)} noticed")
    for trial in trials:
        if not trial.noticed:
            print(f"  {trial.kernel}, {trial.variant}: {trial.mutation}\n    {trial.explanation}")


def main() -> int:
    """Run it; 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architecture", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--few", action="store_true", help="the variants of the tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--mutations", type=int, metavar="NUMBER", help="so many changes instead")
    options = parser.parse_args()
    start = time.perf_counter()
    with workers(options.jobs) as executor:
        if options.mutations is not None:
            tasks = [
                executor.submit(mutate, variants, options.architecture[-1], number)
                for variants, number in zip(MUTATED, _shares(options.mutations), strict=True)
            ]
            report_mutations([trial for task in tasks for trial in task.result()])
            return 0
        variants = few_variants() if options.few else all_variants()
        tasks = [
            executor.submit(execute, variants[first : first + AT_ONCE], options.architecture)
            for first in range(0, len(variants), AT_ONCE)
        ]
        done = tqdm(concurrent.futures.as_completed(tasks), total=len(tasks), disable=None)
        outcomes = [outcome for task in done for outcome in task.result()]
    return min(report(outcomes, time.perf_counter() - start), 1)


def _shares(total: int) -> list[int]:
    """A number in about equal parts."""
    parts = len(MUTATED)
    return [total // parts + (part < total % parts) for part in range(parts)]


if __name__ == "__main__":
    sys.exit(main())
