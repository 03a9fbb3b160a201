"""Is the result the same whatever the number of ranks? A small segmentation is trained on real
pixels: by one process; by 2, 4 and 8 ranks that share its batch of 8, with SyncBN; with batch norm
that does not synchronize, or does so wrongly; with fixed statistics. All arms start from the same
weights and see the same batches.

Writes equivalence.csv (a row for each training), equivalence_losses.csv (a row for each step of the
first seed) and pictures. The exit status is 1 if in float64 a loss of SyncBN differs by more than
1e-8 from that of one process.

Runs in 8 processes on this machine, on CPUs. On GPUs: torchrun --nproc-per-node=8
perf/equivalence.py --device cuda; arms of more ranks than there are processes are left out.
"""

import argparse
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from machine.environment import environment
from machine.ranks import Place, is_first_rank
from report.themes import write_pictures
from segmentation.arms import ARMS, BATCH, REFERENCE
from segmentation.data import Data, load_data
from segmentation.pictures import draw_differences, draw_results
from segmentation.processes import count_processes, run_on_processes
from segmentation.table import (
    Key,
    losses_table,
    summary_table,
    summary_text,
    worst_exact_difference,
)
from segmentation.training import Run, train
from tqdm import tqdm

EXACT = 1e-8  # of a loss: 2**-53 a rounding, and training itself amplifies differences


def train_all(place: Place, data: Data, seeds: range, steps: int) -> tuple[dict[Key, Run], float]:
    """Every training that there are ranks for, with the first seed in float64 as well, if this is
    the first rank; and the processor time of all ranks in seconds.
    """
    arms = {name: arm for name, arm in ARMS.items() if len(arm.shares) <= place.world_size}
    groups = {
        size: dist.new_group(range(size)) for size in {len(a.shares): 0 for a in arms.values()}
    }
    plan = [
        *(Key("float64", seeds[0], name) for name in arms if arms[name].exact or name == REFERENCE),
        *(Key("float32", seed, name) for seed in seeds for name in arms),
    ]
    runs = {}
    with tqdm(total=steps * len(plan), disable=place.rank > 0, mininterval=1.0) as progress:
        for key in plan:
            arm = arms[key.arm]
            if place.rank < (size := len(arm.shares)):
                progress.set_description(", ".join(map(str, key)))
                dtype = getattr(torch, key.dtype)
                group = groups[size]
                run = train(arm, place, group, data, key.seed, steps, dtype, progress.update)
                if run is not None:
                    runs[key] = run
    seconds = torch.tensor(time.process_time(), device=place.device)
    dist.all_reduce(seconds)
    return runs, seconds.item()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of a training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="this many (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/equivalence"), metavar="FOLDER"
    )
    options = parser.parse_args(arguments)
    if not 2 <= (count := count_processes(options.device)) <= BATCH:
        parser.error(f"expected 2 to {BATCH} processes, each with a device, got {count}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, write and draw; 1 if SyncBN does not follow one process."""
    options = parse(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    data = load_data()
    began = time.perf_counter()
    runs, processor_seconds = run_on_processes(
        options.device, train_all, data, seeds, options.steps
    )
    if not is_first_rank():
        return 0
    seconds = time.perf_counter() - began
    report(runs, data, options)
    print(f"{seconds:.0f} s; {processor_seconds:.0f} s of processors")
    worst = worst_exact_difference(runs)
    print(f"SyncBN, float64: losses differ from those of one process by {worst:.1e} at most")
    return int(not worst <= EXACT)


def report(runs: dict[Key, Run], data: Data, options: argparse.Namespace) -> None:
    """Write tables and pictures, print the summary."""
    summary, losses = summary_table(runs), losses_table(runs, options.seed)
    where = environment(torch.device(options.device), count_processes(options.device))
    shown = {key.arm: run.predictions for key, run in runs.items() if key.seed == options.seed}
    options.out.mkdir(parents=True, exist_ok=True)
    summary.assign(**where).to_csv(options.out / "equivalence.csv", index=False)
    losses.to_csv(options.out / "equivalence_losses.csv", index=False)
    files = [
        *write_pictures(
            lambda theme: draw_results(summary, losses, shown, data, theme),
            options.out,
            "equivalence",
        ),
        *write_pictures(
            lambda theme: draw_differences(losses, theme), options.out, "equivalence_losses"
        ),
    ]
    print(summary_text(summary))
    print(f"Pictures: {', '.join(files)}")


if __name__ == "__main__":
    sys.exit(main())
