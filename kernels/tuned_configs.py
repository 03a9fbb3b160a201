"""Configs that were measured, one JSON file a GPU: found here, written by perf/tune.py.

`lookup` is what a launcher asks. It never measures: a shape whose bucket has an entry in the file
of its GPU gets that entry, any other shape the default. A file is `<device name>.json`, in the
folder that TRITON_SYNCBN_CONFIG_DIR names or, where there is none, in `configs/` beside this; it is
read once in a process, when the first layer runs on such a GPU.
"""

import functools
import json
import logging
import os
import pathlib
import re
import threading
from typing import Any, NamedTuple

import torch

from . import launch_config
from .indexing import Geometry, span_of_row
from .launch_config import (
    MOST_SPLITS,
    REDUCTIONS,
    WRITERS,
    LaunchConfig,
    default_config,
    fit_splits,
)

SCHEMA = 1
VARIABLE = "TRITON_SYNCBN_CONFIG_DIR"
SHIPPED = pathlib.Path(__file__).with_name("configs")
LAYOUTS = ("channels_first", "channels_last")
# Of a tile or a flat block: up to here the writers' division by a reciprocal is exact.
MOST_ELEMENTS = 1 << 15
MOST_CHANNELS = 1 << 10  # of a tile in channels last: the partial sums that are added up at once
MOST_WARPS = 32
FILE_KEYS = {"schema", "device", "arch", "triton", "commit", "entries"}
ENTRY_KEYS = {"config", "shape", "microseconds", "default_microseconds"}

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


_BUCKET = re.compile(
    rf"({'|'.join(REDUCTIONS + WRITERS)}) ({'|'.join(LAYOUTS)}) bytes=([248]) vector=([1248]) "
    r"channels=2\^(\d+) rows=2\^(\d+) columns=2\^(\d+)"
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
def lookup(kernel: str, shape: Geometry, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    """The config of a launch: that of its very bucket, measured on such a GPU, or the default.

    kernel: "moments", "normalize", "grad_moments" or "grad_input". shape, dtype, device: of the
    input. Raises ValueError where the file of the GPU is malformed, with its name and the entry.
    """
    _source, configs = _configs_of(device_name(device))
    config = configs.get(bucket_of(kernel, shape, dtype))
    if config is None:
        return default_config(kernel, shape, launch_config.multiprocessors(device))
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


def _configs_of(name: str) -> tuple[str, dict[Bucket, LaunchConfig]]:
    with _reading:  # one thread reads, and logs
        return _find(name)


@functools.cache
def _find(name: str) -> tuple[str, dict[Bucket, LaunchConfig]]:
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


def read_configs(file: pathlib.Path, name: str) -> dict[Bucket, LaunchConfig]:
    """The entries of a file that was made for the device `name`.

    Raises ValueError, with the name of the file and of the entry, for a file that is not what
    perf/tune.py writes or has a config that some shape of its bucket cannot be launched with.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() >= FILE_KEYS:
        raise ValueError(f"{file}: expected an object with {sorted(FILE_KEYS)}")
    for key, expected in (("schema", SCHEMA), ("device", name)):
        if content[key] != expected:
            raise ValueError(f"{file}: {key}: expected {expected!r}, got {content[key]!r}")
    if not isinstance(content["entries"], dict):
        raise ValueError(f"{file}: entries: expected an object")
    configs = {}
    for key, entry in content["entries"].items():
        try:
            bucket = _parse_bucket(key)
            configs[bucket] = _parse_entry(bucket, entry)
        except ValueError as error:
            raise ValueError(f"{file}: entry {key!r}: {error}") from error
    return configs


def _parse_bucket(key: str) -> Bucket:
    match = _BUCKET.fullmatch(key)
    if not match:
        example = Bucket("moments", "channels_first", 2, 8, 6, 5, 14)
        raise ValueError(f"expected a name like {str(example)!r}")
    kernel, layout, *sizes = match.groups()
    return Bucket(kernel, layout, *map(int, sizes))


def _parse_entry(bucket: Bucket, entry: Any) -> LaunchConfig:
    if not isinstance(entry, dict) or not entry.keys() >= ENTRY_KEYS:
        raise ValueError(f"expected an object with {sorted(ENTRY_KEYS)}")
    for key in ("microseconds", "default_microseconds"):
        if type(entry[key]) not in (int, float) or not entry[key] > 0:
            raise ValueError(f"{key}: expected a number above 0, got {entry[key]!r}")
    config = entry["config"]
    if not isinstance(config, dict) or config.keys() != set(LaunchConfig._fields):
        raise ValueError(f"config: expected an object with {sorted(LaunchConfig._fields)}")
    if any(type(value) is not int or value < 1 for value in config.values()):
        raise ValueError(f"config: expected integers of at least 1, got {config}")
    config = LaunchConfig(**config)
    check_config(bucket, config)
    return config


def check_config(bucket: Bucket, config: LaunchConfig) -> None:
    """Raise ValueError unless every shape of the bucket can be launched with the config."""
    tile = config.block_rows * config.block_columns
    for field in ("block_rows", "block_columns", "num_warps"):
        value = getattr(config, field)
        if value & (value - 1):
            raise ValueError(f"config: {field}: expected a power of two, got {value}")
    for what, value, most in (
        ("num_warps", config.num_warps, MOST_WARPS),
        ("splits", config.splits, MOST_SPLITS),
        ("block_rows x block_columns", tile, MOST_ELEMENTS),
    ):
        if value > most:
            raise ValueError(f"config: {what}: expected at most {most}, got {value}")
    if config.block_columns < bucket.vector:
        raise ValueError(
            f"config: block_columns: expected {bucket.vector} or more, the elements of an access"
        )
    if bucket.layout == "channels_last":
        if config.block_columns > MOST_CHANNELS:
            raise ValueError(f"config: block_columns: expected at most {MOST_CHANNELS} channels")
    elif bucket.kernel in WRITERS:
        if config.block_rows != 1:
            raise ValueError("config: block_rows: expected 1, as channels-first maps are flat here")
    elif config.block_rows > 1 and config.block_columns < 1 << bucket.columns:
        raise ValueError(
            f"config: block_columns: expected {1 << bucket.columns} or more, which hold any row of "
            "this bucket, as block_rows is above 1"
        )
