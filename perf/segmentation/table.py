"""What the trainings have come to, next to that of one process: tables."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from segmentation.arms import ARMS, REFERENCE
from segmentation.training import Run

LAST_STEPS = 20  # whose mean loss is the final one


class Key(NamedTuple):
    """Which training it was."""

    dtype: str
    seed: int
    arm: str


def relative_difference(run: Run, reference: Run) -> Tensor:
    """Of the loss of each step."""
    return (run.losses - reference.losses).abs() / reference.losses


def summary_table(runs: Mapping[Key, Run]) -> pd.DataFrame:
    """A row for each training."""
    rows = []
    for key, run in runs.items():
        reference = runs[key._replace(arm=REFERENCE)]
        moved = (run.statistics - reference.statistics).norm() / reference.statistics.norm()
        rows.append(
            {
                **key._asdict(),
                "steps": len(run.losses),
                "final_loss": run.losses[-LAST_STEPS:].mean().item(),
                "mean_iou": run.mean_iou,
                "largest_loss_difference": relative_difference(run, reference).max().item(),
                "statistics_difference": moved.item(),
            }
        )
    return pd.DataFrame(rows)


def losses_table(runs: Mapping[Key, Run], seed: int) -> pd.DataFrame:
    """A row for each step of the trainings with that seed."""
    tables = []
    for key, run in runs.items():
        if key.seed == seed:
            difference = relative_difference(run, runs[key._replace(arm=REFERENCE)])
            columns = {
                "dtype": key.dtype,
                "arm": key.arm,
                "step": range(len(run.losses)),
                "loss": run.losses.numpy().round(6),
                "difference": [float(f"{value:.2e}") for value in difference],
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables)


def worst_exact_difference(runs: Mapping[Key, Run]) -> float:
    """The largest relative difference of a loss in float64, of the arms that promise none."""
    differences = [
        relative_difference(run, runs[key._replace(arm=REFERENCE)])
        for key, run in runs.items()
        if key.dtype == "float64" and ARMS[key.arm].exact
    ]
    return torch.stack(differences).max().item()


def summary_text(summary: pd.DataFrame) -> str:
    """Means over seeds, largest differences: a line for each arm and dtype."""
    shown = summary.groupby(["dtype", "arm"], sort=False).agg(
        {
            "final_loss": "mean",
            "mean_iou": "mean",
            "largest_loss_difference": "max",
            "statistics_difference": "max",
        }
    )
    return shown.to_string(float_format="{:.3g}".format)
