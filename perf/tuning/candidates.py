"""What is tried: for each bucket one layer, and for it the configs that could be better than the
default. Nothing here asks a device.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from layers.cases import DTYPES, Case
from triton_syncbn.kernels.indexing import Geometry, geometry, span_of_row
from triton_syncbn.kernels.launch_config import (
    MOST_SPLITS,
    WRITERS,
    LaunchConfig,
    default_config,
    fit_splits,
    reduction_blocks,
)
from triton_syncbn.kernels.tuned_configs import Bucket, bucket_of

TILES = (512, 1024, 2048, 4096, 8192)  # elements
WARPS = (1, 2, 4, 8)
# Elements: fewer load too little at a time (one warp may), more do not fit its registers.
LEAST_OF_THREAD, MOST_OF_THREAD = 8, 64
CHANNELS_OF_TILE = (32, 64, 128)  # channels last: 64 bytes of a row and more
WARPS_OF_MULTIPROCESSOR = (8, 16, 32)
# Of a tile or a flat block: up to here the writers' division by a reciprocal is exact.
MOST_ELEMENTS_OF_TILE = 1 << 15
MOST_CHANNELS_OF_TILE = 1 << 10  # channels last: the partial sums that are added up at once
MOST_WARPS = 32


class Job(NamedTuple):
    """A bucket, and the layer that it is tuned on."""

    bucket: Bucket
    case: Case
    shape: Geometry


def jobs_of(cases: Iterable[Case], kernels: Iterable[str]) -> list[Job]:
    """A job for each bucket that the layers fall into, in the order of the layers that they are
    tuned on; where several layers fall into one, that is the largest.
    """
    cases, kernels = list(cases), list(kernels)
    jobs: dict[Bucket, Job] = {}
    for case, kernel in itertools.product(cases, kernels):
        shape = geometry(case.without_memory())
        job = Job(bucket_of(kernel, shape, DTYPES[case.dtype]), case, shape)
        if jobs.setdefault(job.bucket, job).case.bytes < case.bytes:
            jobs[job.bucket] = job
    return sorted(jobs.values(), key=lambda job: cases.index(job.case))


def candidates(job: Job, multiprocessors: int) -> list[LaunchConfig]:
    """The default first, then configs that every shape of the bucket can be launched with."""
    configs = [default_config(job.bucket.kernel, job.shape, multiprocessors)]
    for config in filter(functools.partial(suits, job.bucket), _tiles(job)):
        for splits in _splits(job, config, multiprocessors):
            fitted = fit_splits(job.bucket.kernel, job.shape, config._replace(splits=splits))
            if fitted not in configs:
                configs.append(fitted)
    return configs


def suits(bucket: Bucket, config: LaunchConfig) -> bool:
    """Whether every shape of a bucket can be launched with a config."""
    rows, columns, splits, warps = config
    if any(size < 1 or size & (size - 1) for size in (rows, columns, warps)):
        return False
    if not 1 <= splits <= MOST_SPLITS or warps > MOST_WARPS:
        return False
    if rows * columns > MOST_ELEMENTS_OF_TILE or columns < bucket.vector:
        return False
    if bucket.layout == "channels_last":
        return columns <= MOST_CHANNELS_OF_TILE
    if bucket.kernel in WRITERS:  # which walk channels-first maps flat
        return rows == 1
    return rows == 1 or columns >= 1 << bucket.columns  # several rows only where they are whole


def _tiles(job: Job) -> Iterator[LaunchConfig]:
    if job.bucket.kernel in WRITERS and not job.shape.channels_last:
        shapes = [(1, tile) for tile in TILES]
    else:
        row = max(1 << (span_of_row(job.shape) - 1).bit_length(), job.shape.vector)
        widths = {min(row, tile) for tile in TILES}
        if job.shape.channels_last:
            widths = {min(width, 1 << job.bucket.channels) for width in CHANNELS_OF_TILE}
        sides = [(tile, width) for tile in TILES for width in sorted(widths) if width <= tile]
        shapes = [(min(tile // width, 1 << job.bucket.rows), width) for tile, width in sides]
    for (rows, columns), warps in itertools.product(shapes, WARPS):
        each = rows * columns / (32 * warps)
        if each <= MOST_OF_THREAD and (each >= LEAST_OF_THREAD or warps == 1):
            yield LaunchConfig(rows, columns, 1, warps)


def _splits(job: Job, config: LaunchConfig, multiprocessors: int) -> list[int]:
    """How many programs may share a channel."""
    if job.bucket.kernel in WRITERS and not job.shape.channels_last:
        return [1]
    blocks = reduction_blocks(job.shape, config)
    return [
        max(warps * multiprocessors // (config.num_warps * blocks), 1)
        for warps in WARPS_OF_MULTIPROCESSOR
    ]
