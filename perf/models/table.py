"""The rows of models as a file has them, and as a table to read."""

from typing import Any

import pandas as pd

from models.training_step import LOSS_TOLERANCE

FIGURES = [
    *("loss_first", "loss_second", "error_over_tolerance", "samples"),
    *("us_p20", "us_p50", "us_p80", "host_us", "peak_mb"),
]
COLUMNS = ["model", "shape", "dtype", "layout", "world_size", "impl", *FIGURES, "failure"]


def frame_of_models(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows with all COLUMNS; a figure that was not measured is empty."""
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.astype(dict.fromkeys(FIGURES, float))


def models_text(frame: pd.DataFrame) -> str:
    """The table of one model, and what it means."""
    baseline = frame.us_p50.iloc[0]
    text = pd.DataFrame({"impl": frame.impl})
    for column in ("us_p20", "us_p50", "us_p80", "host_us"):
        text[column.replace("us", "ms")] = [
            f"{us * 1e-3:.1f}" if us > 0 else "" for us in frame[column]
        ]
    wrong = frame.error_over_tolerance > 1.0
    text.loc[wrong, "ms_p50"] = "FAIL"
    text["x"] = [f"{baseline / us:.2f}" if us > 0 else "" for us in frame.us_p50]
    text["peak_mb"] = [f"{mb:.0f}" if mb > 0 else "" for mb in frame.peak_mb]
    text["loss"] = [f"{loss:.6f}" for loss in frame.loss_second]
    first = frame.iloc[0]
    tolerance = LOSS_TOLERANCE[first["dtype"]]
    lines = [
        f"{first.model}, {first['shape']} a rank, {first['dtype']}, {first.layout}, "
        f"ranks: {first.world_size}. A training step; x: {first.impl} / impl, more is better.",
        text.to_string(index=False),
        f"loss: after one step; relative differences are tolerated up to {tolerance}.",
    ]
    for impl, error in frame.loc[wrong, ["impl", "error_over_tolerance"]].values:
        lines.append(f"FAIL: the loss of {impl} is {error:.3g} times the tolerance off.")
    for impl, failure in frame.loc[frame.failure.notna(), ["impl", "failure"]].values:
        lines.append(f"{impl} did not run: {failure}")
    return "\n".join(lines)
