"""Is the result the same whatever the number of ranks? A small segmentation network is trained on
real pixels in many ways: by one process; by 2, 4 and 8 ranks that share its batch of 8, with SyncBN;
with batch norm that does not synchronize; with layers that do so wrongly; with fixed statistics.

All start from the same weights and see the same batches. In float64 the losses of SyncBN are those
of one process to 1e-8 or better, or the exit status is 1.

Writes equivalence.csv (a row for each training), losses.csv (each step of the first seed) and pictures.
Runs in 8 processes on this machine. On GPUs: torchrun --nproc-per-node=8 perf/equivalence.py --device
cuda; ways with more ranks than there are processes are left out.
"""

import argparse
import itertools
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from machine.environment import environment
from machine.ranks import Place, is_first_rank
from segmentation.arms import ARMS, REFERENCE
from segmentation.data import Data, load_data
from segmentation.processes import run_on_processes
from segmentation.table import Key, losses_table, summary_table, summary_text, worst_exact_difference
from segmentation.training import Run, train
from tqdm import tqdm

EXACT_STEPS = 100  # in float64
EXACT = 1e-8  # of a loss: 2**-53 a rounding, and training itself amplifies differences


def train_all(place: Place, data: Data, options: argparse.Namespace) -> tuple[dict[Key, Run], float]:
    """Every training that there are ranks for: those that this rank took part in, and the processor
    time of all ranks.
    """
    arms = {name: arm for name, arm in ARMS.items() if len(arm.shares) <= place.world_size}
    groups = {
        size: dist.new_group(range(size)) for size in sorted({len(a.shares) for a in arms.values()})
    }
    exact_steps = min(options.steps, EXACT_STEPS)
    exact_names = [name for name, arm in arms.items() if arm.exact or name == REFERENCE]
    plan = [
        training
        for seed in range(options.seed, options.seed + options.seeds)
        for training in (
            *itertools.product([seed], ["float64"], [exact_steps], exact_names),
            *itertools.product([seed], ["float32"], [options.steps], arms),
        )
    ]
    runs = {}
    with tqdm(total=sum(steps for _, _, steps, _ in plan), disable=place.rank > 0, mininterval=1.0) as progress:
        for seed, dtype, steps, name in plan:
            arm = arms[name]
            if place.rank >= len(arm.shares):
                continue
            progress.set_description(f"{dtype}, seed {seed}, {name}")
            runs[Key(dtype, seed, name)] = train(
                arm,
                place,
                groups[len(arm.shares)],
                data,
                seed,
                steps,
                getattr(torch, dtype),
                progress.update,
            )
    seconds = torch.tensor(time.process_time(), device=place.device)
    dist.all_reduce(seconds)
    return runs, seconds.item()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="of a training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --seed on (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/equivalence"), metavar="FOLDER"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, write and draw; 1 if SyncBN does not follow one process."""
    options = parse(arguments)
    data = load_data()
    began = time.perf_counter()
    runs, seconds = run_on_processes(options.device, train_all, data, options)
    if not is_first_rank():
        return 0
    summary = summary_table(runs).assign(**environment(torch.device(options.device), 1))
    import pickle; pickle.dump((runs, data), open("/tmp/pic/runs.pkl", "wb"))
    losses = losses_table(runs, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    summary.to_csv(options.out / "equivalence.csv", index=False)
    losses.to_csv(options.out / "losses.csv", index=False)
    print(summary_text(summary))
    worst = worst_exact_difference(summary)
    print(f"{time.perf_counter() - began:.0f} s, {seconds:.0f} s of processors")
    print(f"SyncBN in float64: losses are off by at most {worst:.1e} of those of one process")
    return int(not worst <= EXACT)


if __name__ == "__main__":
    sys.exit(main())
