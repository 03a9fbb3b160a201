"""Synchronized batch normalization: a drop-in for torch.nn.SyncBatchNorm, on Triton kernels."""

import pathlib as _pathlib

from .checkpointing import checkpoint_contexts
from .communication import debug
from .functional import sync_batch_norm
from .groups import sync_group
from .module import SyncBN
from .version import __version__

__all__ = [
    "SyncBN",
    "__version__",
    "checkpoint_contexts",
    "convert_sync_batchnorm",
    "debug",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "sync_group",
]

convert_sync_batchnorm = SyncBN.convert_sync_batchnorm
revert_sync_batchnorm = SyncBN.revert_sync_batchnorm

# An installation holds the kernels in this folder; a checkout holds them beside it.
_package = _pathlib.Path(__file__).resolve().parent
if not (_package / "kernels").is_dir() and (_package.parent / "kernels" / "moments.py").is_file():
    __path__.append(str(_package.parent))
