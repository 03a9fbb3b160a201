"""What a file of configs has to be, so that a launch may trust it: checked before one is written,
and by a test of those that are shipped.
"""

import re
from typing import Any

from layers.cases import LAYOUTS
from layers.steps import KERNELS
from triton_syncbn.kernels.launch_config import MOST_SPLITS, WRITERS, LaunchConfig
from triton_syncbn.kernels.tuned_configs import SCHEMA, Bucket

# Of a tile or a flat block: up to here the writers' division by a reciprocal is exact.
MOST_ELEMENTS_OF_TILE = 1 << 15
MOST_CHANNELS_OF_TILE = 1 << 10  # channels last: the partial sums that are added up at once
MOST_WARPS = 32
FILE_KEYS = {"schema", "device", "arch", "triton", "commit", "entries"}
ENTRY_KEYS = {"config", "shape", "microseconds", "default_microseconds"}

_BUCKET = re.compile(
    rf"({'|'.join(KERNELS)}) ({'|'.join(LAYOUTS)}) bytes=([248]) vector=([1248]) "
    r"channels=2\^(\d+) rows=2\^(\d+) columns=2\^(\d+)"
)


def check_content(content: Any) -> None:
    """Raise ValueError, with the entry, unless the content of a file is what tune.py writes and
    every shape of a bucket can be launched with its config.
    """
    if not isinstance(content, dict) or not content.keys() >= FILE_KEYS:
        raise ValueError(f"expected an object with {sorted(FILE_KEYS)}")
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {content['schema']!r}")
    if not isinstance(content["entries"], dict):
        raise ValueError("entries: expected an object")
    for key, entry in content["entries"].items():
        try:
            _check_entry(parse_bucket(key), entry)
        except ValueError as error:
            raise ValueError(f"entry {key!r}: {error}") from error


def parse_bucket(key: str) -> Bucket:
    """The bucket of a key. Raises ValueError for any other text."""
    match = _BUCKET.fullmatch(key)
    if not match:
        example = Bucket("moments", "channels_first", 2, 8, 6, 5, 14)
        raise ValueError(f"expected a name like {str(example)!r}")
    kernel, layout, *sizes = match.groups()
    return Bucket(kernel, layout, *map(int, sizes))


def _check_entry(bucket: Bucket, entry: Any) -> None:
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
    check_config(bucket, LaunchConfig(**config))


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
        ("block_rows x block_columns", tile, MOST_ELEMENTS_OF_TILE),
    ):
        if value > most:
            raise ValueError(f"config: {what}: expected at most {most}, got {value}")
    if config.block_columns < bucket.vector:
        raise ValueError(
            f"config: block_columns: expected {bucket.vector} or more, the elements of an access"
        )
    if bucket.layout == "channels_last":
        if config.block_columns > MOST_CHANNELS_OF_TILE:
            raise ValueError(
                f"config: block_columns: expected at most {MOST_CHANNELS_OF_TILE} channels"
            )
    elif bucket.kernel in WRITERS:
        if config.block_rows != 1:
            raise ValueError("config: block_rows: expected 1, as channels-first maps are flat here")
    elif config.block_rows > 1 and config.block_columns < 1 << bucket.columns:
        raise ValueError(
            f"config: block_columns: expected {1 << bucket.columns} or more, which hold any row of "
            "this bucket, as block_rows is above 1"
        )
