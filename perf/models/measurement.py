"""The rows of a whole model: the time of a training step with each layer, and its memory.

Every layer gets the same weights and data. The loss before a first step and after it must agree
with that of the stock layer, or there is no time. A time is that of forward, loss, backward and
SGD, of the slowest rank; DistributedDataParallel where there are several. Without a GPU inputs are
small, and gather_syncbn is in the place of torch.nn.SyncBatchNorm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from layers.gather_syncbn import GatherSyncBN
from layers.implementations import OURS, SynchronizedTorchSyncBatchNorm, synchronized_even_alone
from machine.ranks import Place
from measuring.times import Call, call_of, percentiles, time_calls

import triton_syncbn
from models.networks import make_model
from models.table import frame_of_models
from models.training_step import TrainingStep, error_of_losses

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


def layer_classes(device: torch.device) -> dict[str, type[Any] | None]:
    """For each name the class that batch norm layers become, None for none; the first is the stock
    layer that the others are held against.
    """
    ours = triton_syncbn.SyncBN
    if device.type == "cuda":
        stock = {"torch_syncbn": SynchronizedTorchSyncBatchNorm}
        return {**stock, UNSYNCHRONIZED: None, OURS: ours, COMPILED: ours}
    return {"gather_syncbn": GatherSyncBN, UNSYNCHRONIZED: None, OURS: ours}


def measure_model(
    place: Place,
    name: str,
    dtype: str,
    layout: str,
    samples: int,
    *,
    shape: Sequence[int] | None = None,
    classes: Mapping[str, type[Any] | None] | None = None,
) -> pd.DataFrame:
    """A row for each layer of `classes`; all ranks of the default process group make the call.

    `us_p20`, `us_p50`, `us_p80`: microseconds of a step, on a GPU of the device; `host_us`: of the
    host, median. `peak_mb`: memory of a step on a GPU, with model, gradients and optimizer, from a
    run of its own. `error_over_tolerance`: of the loss; above 1 the row has neither time nor
    memory. It is empty for torch_batchnorm where there are several ranks: its losses are others.
    `failure`: why the compiled layer could not be run.
    """
    device, gpu = place.device, place.device.type == "cuda"
    shape = shape or (GPU_SHAPES if gpu else CPU_SHAPES)[name]
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
                "world_size": place.world_size,
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
            comparable = impl != UNSYNCHRONIZED or place.world_size == 1
            error = error_of_losses(losses, expected, dtype) if comparable else None
            rows[impl] |= {
                "loss_first": losses[0],
                "loss_second": losses[1],
                "error_over_tolerance": error,
            }
            if error is None or error <= 1.0:  # what is wrong has no time
                peak = step.peak_bytes()
                rows[impl]["peak_mb"] = None if peak is None else (peak - before) * 1e-6
                calls[impl] = call_of(step)
        for impl, seconds in time_calls(calls, device, samples, warm_cache=True).items():
            p20, p50, p80 = percentiles(seconds.device)
            rows[impl] |= {"samples": samples, "us_p20": p20, "us_p50": p50, "us_p80": p80}
            rows[impl]["host_us"] = percentiles(seconds.host)[1]
    return frame_of_models(list(rows.values()))
