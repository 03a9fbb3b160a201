"""Train whole models with each layer: the time of a step, and its memory.

Every layer gets the same weights and data. The loss before a first step and after it must agree
with that of the stock layer, or there is no time. A time is that of forward, loss, backward and
SGD, of the slowest rank; DistributedDataParallel where there are several. Without a GPU: two
processes on this machine over gloo, small inputs, and gather_syncbn in the place of
torch.nn.SyncBatchNorm.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cases import LAYOUTS
from gather_syncbn import GatherSyncBN
from implementations import OURS, SynchronizedTorchSyncBatchNorm, synchronized_even_alone
from model_table import report, tidy
from models import CLASSES, make_model
from timing import Call, percentiles, time_calls
from training_step import TrainingStep, loss_error_over_tolerance

import triton_syncbn

COMPILED = f"{OURS}_compiled"
UNSYNCHRONIZED = "torch_batchnorm"
GPU_SHAPES = {
    "resnet50": (32, 3, 224, 224),
    "deeplab": (2, 3, 769, 769),
    "unet3d": (2, 3, 128, 128, 128),
}
CPU_SHAPES = {
    "resnet50": (2, 3, 64, 64),
    "deeplab": (2, 3, 33, 33),
    "unet3d": (2, 3, 8, 16, 16),
}
CPU_RANKS = 2
GPU_SAMPLES = 30
CPU_SAMPLES = 3


def layer_classes(device: torch.device) -> dict[str, type[Any] | None]:
    """For each name the class that batch norm layers become, None for none; the first is the stock
    layer that the others are held against.
    """
    if device.type == "cuda":
        stock: dict[str, type[Any] | None] = {"torch_syncbn": SynchronizedTorchSyncBatchNorm}
    else:
        stock = {"gather_syncbn": GatherSyncBN}
    ours: dict[str, type[Any] | None] = {OURS: triton_syncbn.SyncBN}
    if device.type == "cuda":
        ours[COMPILED] = triton_syncbn.SyncBN
    return {**stock, UNSYNCHRONIZED: None, **ours}


def measure_model(
    name: str,
    device: torch.device,
    *,
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    layout: str = LAYOUTS[0],
    samples: int | None = None,
    classes: Mapping[str, type[Any] | None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each layer of `classes`; all ranks of the default process group make the call.

    `us_p20`, `us_p50`, `us_p80`: microseconds of a step, on a GPU of the device; `host_us`: of the
    host, median. `peak_mb`: memory of a step on a GPU, with model, gradients and optimizer, from a
    run of its own. `error_over_tolerance`: of the loss; above 1 the row has neither time nor
    memory. It is empty for torch_batchnorm where there are several ranks: its losses are others.
    `failure`: why the compiled layer could not be run.
    """
    gpu = device.type == "cuda"
    shape = shape or (GPU_SHAPES if gpu else CPU_SHAPES)[name]
    dtype = dtype or ("bf16" if gpu else "fp32")
    samples = samples or (GPU_SAMPLES if gpu else CPU_SAMPLES)
    torch.manual_seed(0)
    model = make_model(name)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    expected: list[float] = []
    with synchronized_even_alone():
        for impl, layer_class in (classes or layer_classes(device)).items():
            before = torch.cuda.memory_allocated(device) if gpu else 0
            rows[impl] = {
                "model": name,
                "shape": "x".join(map(str, shape)),
                "dtype": dtype,
                "layout": layout,
                "world_size": dist.get_world_size(),
                "impl": impl,
            }
            step = TrainingStep(
                name, model, layer_class, shape, device, dtype, layout, impl == COMPILED
            )
            try:
                losses = step.losses()
            except Exception as failure:  # the compiler's
                if impl != COMPILED:
                    raise
                rows[impl]["failure"] = str(failure).strip().partition("\n")[0]
                continue
            expected = expected or losses
            comparable = impl != UNSYNCHRONIZED or dist.get_world_size() == 1
            error = loss_error_over_tolerance(losses, expected, dtype) if comparable else None
            rows[impl] |= {
                "loss_first": losses[0],
                "loss_second": losses[1],
                "error_over_tolerance": error,
            }
            if error is None or error <= 1.0:  # what is wrong has no time
                peak = step.peak_bytes()
                rows[impl]["peak_mb"] = None if peak is None else (peak - before) * 1e-6
                calls[impl] = Call(_ignoring(step))
        for impl, seconds in time_calls(calls, device, samples, warm_cache=True).items():
            p20, p50, p80 = percentiles(seconds.device)
            rows[impl] |= {"samples": samples, "us_p20": p20, "us_p50": p50, "us_p80": p80}
            rows[impl]["host_us"] = percentiles(seconds.host)[1]
    return list(rows.values())


def _ignoring(step: TrainingStep) -> Any:
    return lambda prepared: step()


def run(
    name: str,
    *,
    shape: Sequence[int] | None = None,
    layout: str = LAYOUTS[0],
    samples: int | None = None,
) -> pd.DataFrame:
    """Measure a model on the ranks of torchrun; else on the GPU, alone; else in two processes.

    Makes the process group and ends it. Returns the rows of `measure_model`, on every rank.
    """
    keywords = {"shape": shape, "layout": layout, "samples": samples}
    if "WORLD_SIZE" in os.environ:  # under torchrun
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return _one_rank(rank, world_size, "env://", name, keywords)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        world_size = 1 if torch.cuda.is_available() else CPU_RANKS
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(
                target=_one_rank, args=(rank, world_size, store, name, keywords), daemon=True
            )
            for rank in range(1, world_size)
        ]
        for process in others:
            process.start()
        frame = _one_rank(0, world_size, store, name, keywords)
        for process in others:
            process.join()
        return frame


def _one_rank(
    rank: int, world_size: int, store: str, name: str, keywords: dict[str, Any]
) -> pd.DataFrame:
    gpu = torch.cuda.is_available()
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=world_size
    )
    try:
        return tidy(measure_model(name, device, **keywords))
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Measure a model; 1 if a layer is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=CLASSES)
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--input", metavar="NxCx...", help="shape of the input of a rank")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    parser.add_argument("--samples", type=int, help="timed steps")
    options = parser.parse_args(arguments)
    shape = tuple(map(int, options.input.split("x"))) if options.input else None
    frame = run(options.model, shape=shape, layout=options.layout, samples=options.samples)
    if int(os.environ.get("RANK", 0)) == 0:
        print(report(frame))
        if options.csv:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(options.csv, index=False, float_format="%.6g")
    return int((frame.error_over_tolerance > 1.0).any())


if __name__ == "__main__":
    sys.exit(main())
