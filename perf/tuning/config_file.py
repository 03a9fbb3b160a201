"""The file of a GPU that perf/tune.py writes, and that a launch finds its config in."""

import json
import os
import pathlib
from typing import Any

import triton
from machine.environment import ROOT, commit
from triton_syncbn.kernels import tuned_configs

from tuning.candidates import Job
from tuning.trial import Outcome

FOLDER = ROOT / "kernels" / "configs"


class ConfigFile:
    """The file of a GPU: entries, and buckets where the default stays."""

    def __init__(self, name: str, arch: str, folder: pathlib.Path | None = None) -> None:
        self.path = (folder or FOLDER) / tuned_configs.file_name(name)
        self.made_by = {
            "schema": tuned_configs.SCHEMA,
            "device": name,
            "arch": arch,
            "triton": triton.__version__,
            "commit": commit() or "unknown",
        }
        self.entries: dict[str, dict[str, Any]] = {}
        self.defaults: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Go on where the file of an earlier run ends.

        Raises ValueError if it was made for another GPU, by another Triton or of another commit.
        """
        if not self.path.exists():
            return
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        self.entries, self.defaults = earlier.pop("entries"), earlier.pop("defaults")
        if earlier != self.made_by:
            raise ValueError(
                f"{self.path}: expected one of {self.made_by} to go on, got {earlier}; run without "
                "--resume"
            )

    def knows(self, job: Job) -> bool:
        """Whether a bucket has been decided."""
        return str(job.bucket) in self.entries | self.defaults

    def add(self, job: Job, outcome: Outcome) -> None:
        """Take in what was found for a bucket."""
        entry: dict[str, Any] = {
            "shape": f"{job.case.shape_name} {job.case.dtype}",
            "default_microseconds": round(outcome.default_microseconds, 3),
        }
        if outcome.config is None:
            self.defaults[str(job.bucket)] = entry
        else:
            entry["microseconds"] = round(outcome.microseconds, 3)
            self.entries[str(job.bucket)] = {"config": outcome.config._asdict(), **entry}

    def write(self) -> None:
        """Write the file whole, or leave it as it is."""
        content = {**self.made_by, "entries": self.entries, "defaults": self.defaults}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)
