"""Where a row was measured: machine, versions, commit."""

import datetime
import pathlib
import subprocess
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSIONS = ("driver", "torch", "triton", "cuda", "nccl", "config")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What every row says of the machine and its software; None where there is nothing to say."""
    gpu = device.type == "cuda"
    try:
        from triton import __version__ as triton_version
    except ModuleNotFoundError:
        triton_version = None
    return {
        "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dirty": has_changes(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "gpu_count": torch.cuda.device_count() if gpu else 0,
        "driver": _driver() if gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "world_size": world_size,
        "config": config_in_use(device),
    }


def config_in_use(device: torch.device) -> str | None:
    """Where the launch configs of the kernels come from; None where no kernel runs."""
    if device.type != "cuda":
        return None
    from triton_syncbn.kernels import tuned_configs

    return tuned_configs.config_source(device)


def commit() -> str | None:
    """The commit of this checkout; None where there is no git or no repository."""
    return answer("git", "rev-parse", "--short=12", "HEAD")


def has_changes() -> bool:
    """Whether the checkout differs from its commit."""
    return bool(answer("git", "status", "--porcelain"))


def answer(*command: str) -> str | None:
    """What a command prints, run in this checkout; None where it fails or there is none."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    """The version of the driver, as nvidia-smi says it."""
    versions = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None
