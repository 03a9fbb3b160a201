"""Configs that were measured, one JSON file a GPU: found here, written by perf/tune.py.

`lookup` is what a launcher asks. It never measures: a shape whose bucket has an entry in the file
of its GPU gets that entry, any other shape the default. A file is `<device name>.json`, in the
folder that TRITON_SYNCBN_CONFIG_DIR names or, where there is none, in `configs/` beside this; it is
read once in a process, when the first layer runs on such a GPU. That a config suits every shape of
its bucket is checked where files are written and shipped, not where they are read.
"""

import functools
import json
import logging
import os
import pathlib
import re
import threading
from typing import NamedTuple

import torch

from . import launch_config
from .indexing import Geometry, span_of_row
from .launch_config import LaunchConfig, default_config, fit_splits, tile_beside_residual

SCHEMA = 1
VARIABLE = "TRITON_SYNCBN_CONFIG_DIR"
SHIPPED = pathlib.Path(__file__).with_name("configs")
LAYOUTS = ("channels_first", "channels_last")

_log = logging.getLogger("triton_syncbn")
_reading = threading.Lock()


class Bucket(NamedTuple):
    """Launches that share an entry. Sizes are logarithms to base 2, rounded up: 6 is 33 to 64."""

    kernel: str
    layout: str
    item_size: int  # bytes of an element of the input
    vector: int  # elements of an access, see Geometry
    channels: int
    rows: int  # channels first: samples; channels last: samples x positions
    columns: int  # channels first: elements of the aligned vectors that cover a row; else 0

    def __str__(self) -> str:
        """The key of its entry in a file."""
        return (
            f"{self.kernel} {self.layout} bytes={self.item_size} vector={self.vector} "
            f"channels=2^{self.channels} rows=2^{self.rows} columns=2^{self.columns}"
        )


def _logarithm(size: int) -> int:
    return (max(size, 1) - 1).bit_length()


def bucket_of(kernel: str, shape: Geometry, dtype: torch.dtype) -> Bucket:
    """The bucket of a launch."""
    return Bucket(
        kernel,
        LAYOUTS[shape.channels_last],
        dtype.itemsize,
        shape.vector,
        _logarithm(shape.channels),
        _logarithm(shape.rows),
        _logarithm(span_of_row(shape)),
    )


@functools.lru_cache(maxsize=4096)
def lookup(
    kernel: str,
    shape: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    residual: bool = False,
) -> LaunchConfig:
    """The config of a launch: that of its very bucket, measured on such a GPU, or the default; with
    a smaller tile where there is a residual or its gates, too.

    kernel: "moments", "normalize", "grad_moments" or "grad_input". shape, dtype, device: of the
    input. Raises ValueError where the file of the GPU is malformed, with its name.
    """
    _source, configs = _configs_of(device_name(device))
    config = configs.get(str(bucket_of(kernel, shape, dtype)))
    if config is None:
        config = default_config(kernel, shape, launch_config.multiprocessors(device))
    if residual:
        config = tile_beside_residual(shape, config, dtype.itemsize)
    return fit_splits(kernel, shape, config)


def config_source(device: torch.device) -> str:
    """Where the configs of a device come from: the name of a file, or "default"."""
    return _configs_of(device_name(device))[0]


def device_name(device: torch.device) -> str:
    """What the driver calls a GPU, such as "NVIDIA H200"; a name of its own for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton interpreter"


def file_name(name: str) -> str:
    """The file of a device: "NVIDIA H200" has NVIDIA_H200.json."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".json"


def _configs_of(name: str) -> tuple[str, dict[str, LaunchConfig]]:
    with _reading:  # one thread reads, and logs
        return _find(name)


@functools.cache
def _find(name: str) -> tuple[str, dict[str, LaunchConfig]]:
    folders = [SHIPPED]
    if chosen := os.environ.get(VARIABLE):
        folders.insert(0, pathlib.Path(chosen))
        if not folders[0].is_dir():
            raise ValueError(f"{VARIABLE}: expected a folder, got {chosen!r}")
    for folder in folders:
        file = folder / file_name(name)
        if file.is_file():
            return file.name, read_configs(file, name)
    _log.debug("no tuned configs for %s: default configs are used", name)
    return "default", {}


def read_configs(file: pathlib.Path, name: str) -> dict[str, LaunchConfig]:
    """The configs of a file that perf/tune.py has written for the device `name`, by their keys.

    Raises ValueError, with the name of the file, for any other file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["schema"], content["device"]
        entries = content["entries"].items()
        configs = {key: LaunchConfig(**entry["config"]) for key, entry in entries}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"expected what perf/tune.py writes: {type(error).__name__}: {error}"
        raise ValueError(f"{file}: {what}") from error
    if found != (SCHEMA, name):
        raise ValueError(f"{file}: expected schema and device {(SCHEMA, name)}, got {found}")
    for key, config in configs.items():
        if any(type(value) is not int or value < 1 for value in config):
            raise ValueError(f"{file}: {key!r}: expected integers of at least 1, got {config}")
    return configs
