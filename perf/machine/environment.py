"""Where a row was measured: machine, versions, commit."""

import contextlib
import datetime
import pathlib
import subprocess
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSIONS = ("driver", "torch", "triton", "cuda", "nccl", "config")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What every row says of the machine and its software; None where there is nothing to say."""
    setting: dict[str, Any] = {
        "timestamp_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dirty": has_changes(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "world_size": world_size,
        **dict.fromkeys(["gpu", "driver", "triton", "nccl", "config"]),
    }
    with contextlib.suppress(ModuleNotFoundError):
        import triton

        setting["triton"] = triton.__version__
    if device.type == "cuda":
        from triton_syncbn.kernels import tuned_configs

        driver = ("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
        setting |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": answer(*driver),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "config": tuned_configs.config_source(device),
        }
    return setting


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
