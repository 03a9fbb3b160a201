"""The file of a GPU that perf/tune.py writes, and that a launch finds its config in."""

import json
import os
from typing import Any

import triton
from machine.environment import ROOT, commit
from triton_syncbn.kernels import tuned_configs
from triton_syncbn.kernels.launch_config import LaunchConfig

from tuning.candidates import Job
from tuning.config_check import check_content

FOLDER = ROOT / "kernels" / "configs"


class ConfigFile:
    """The file of a GPU: entries, and buckets where the default stays."""

    def __init__(self, name: str, arch: str) -> None:
        self.path = FOLDER / tuned_configs.file_name(name)
        self.content: dict[str, Any] = {
            "schema": tuned_configs.SCHEMA,
            "device": name,
            "arch": arch,
            "triton": triton.__version__,
            "commit": commit() or "unknown",
            "entries": {},
            "defaults": {},
        }

    def resume(self) -> None:
        """Go on where the file of an earlier run ends.

        Raises ValueError if it was made for another GPU, by another Triton or of another commit.
        """
        if not self.path.exists():
            return
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        for key in ("schema", "device", "arch", "triton", "commit"):
            if earlier.get(key) != self.content[key]:
                raise ValueError(
                    f"{self.path}: {key}: expected {self.content[key]!r} to go on, got "
                    f"{earlier.get(key)!r}; run without --resume"
                )
        self.content = earlier

    def knows(self, job: Job) -> bool:
        """Whether a bucket has been decided."""
        return str(job.bucket) in self.content["entries"] | self.content["defaults"]

    def add(
        self,
        job: Job,
        config: LaunchConfig | None,
        microseconds: float,
        default_microseconds: float,
    ) -> None:
        """Take in what was found for a bucket; config: None where the default stays."""
        entry = {
            "shape": f"{job.case.shape_name} {job.case.dtype}",
            "microseconds": round(microseconds, 3),
            "default_microseconds": round(default_microseconds, 3),
        }
        if config is None:
            del entry["microseconds"]
            self.content["defaults"][str(job.bucket)] = entry
        else:
            self.content["entries"][str(job.bucket)] = {"config": config._asdict(), **entry}

    def write(self) -> None:
        """Write the file whole, or leave it as it is.

        Raises ValueError, with the entry, where one does not suit every shape of its bucket.
        """
        check_content(self.content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)
