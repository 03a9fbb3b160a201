"""The trainings as pictures: losses, scores, predictions; how far losses are from one process."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from report.themes import WIDTH, Theme
from torch import Tensor

from segmentation.arms import ARMS, REFERENCE
from segmentation.data import SIZE, Data

SMOOTHED_OVER = 10  # steps of a loss curve
SHOWN = ("SyncBN, 8 x 1", "BatchNorm, 8 x 1", "fixed statistics, lr / 10")
IN_PAIRS = "SyncBN in pairs, 8 x 1"
IMAGES_SHOWN = (0, 4)
ENLARGED = 4  # of predictions, so that no viewer smooths them
CLASS_COLORS = np.array([[89, 99, 110], [64, 156, 255], [255, 153, 51]], np.uint8)  # none, 0, 1


def color_of(arm: str, theme: Theme) -> str:
    """Of a line or a bar."""
    kinds = {"SyncBN": theme.ours, "BatchNorm": theme.torch, "fixed": theme.fixed}
    if arm == REFERENCE:
        return theme.other
    return next((color for kind, color in kinds.items() if arm.startswith(kind)), theme.wrong)


def draw_results(
    summary: pd.DataFrame,
    losses: pd.DataFrame,
    predictions: Mapping[str, Tensor],
    data: Data,
    theme: Theme,
) -> Any:
    """Loss curves of the first seed and mean IoU of all, float32; below, what some arms predict."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.0, 2.6))
    for part in (above, below):
        part.set_facecolor(theme.page)
    curves, bars = above.subplots(1, 2, width_ratios=(1.0, 1.0))
    _draw_losses(curves, losses[losses["dtype"] == "float32"], theme)
    _draw_scores(bars, summary[summary["dtype"] == "float32"], theme)
    shown = {arm: predictions[arm] for arm in (REFERENCE, *SHOWN) if arm in predictions}
    _draw_predictions(below, shown, data)
    return figure


def _draw_losses(axes: Any, losses: pd.DataFrame, theme: Theme) -> None:
    def draw(arm: str, label: str, **style: Any) -> None:
        rows = losses[losses.arm == arm]
        smooth = rows.loss.rolling(SMOOTHED_OVER, min_periods=1).mean()
        axes.plot(rows.step, smooth, color=color_of(arm, theme), label=label, **style)

    present = set(losses.arm)
    draw(REFERENCE, REFERENCE, linewidth=5, alpha=0.6)
    exact = [arm for arm in ARMS if ARMS[arm].exact and arm in present]
    for arm in exact:
        label = f"SyncBN, {len(exact)} splits: one line" if arm == exact[0] else ""
        draw(arm, label, linewidth=1.4)
    for arm, line in (
        ("BatchNorm, 4 x 2", "--"),
        ("BatchNorm, 8 x 1", "-"),
        ("fixed statistics, lr / 10", "-"),
        ("fixed statistics", ":"),
    ):
        if arm in present:
            draw(arm, arm, linewidth=1.4, linestyle=line)
    longest = losses.step.max()
    axes.set(title="training loss", xlabel="step", ylim=(0.0, 1.2), xlim=(0, longest))
    axes.legend(fontsize=8)


def _draw_scores(axes: Any, summary: pd.DataFrame, theme: Theme) -> None:
    scores = summary.groupby("arm", sort=False).mean_iou.mean()[::-1]
    colors = [color_of(arm, theme) for arm in scores.index]
    bars = axes.barh(scores.index, 100 * scores, color=colors, height=0.72)
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=12)
    positions = {arm: place for place, arm in enumerate(scores.index)}
    if summary.seed.nunique() > 1:
        places = [positions[arm] for arm in summary.arm]
        axes.plot(100 * summary.mean_iou, places, "|", color=theme.ink, markersize=6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.margins(x=0.16)
    axes.set_title("mean IoU of held-out images, %", x=0.2)


def _draw_predictions(figure: Any, predictions: Mapping[str, Tensor], data: Data) -> None:
    columns: dict[str, Any] = {
        "image": (255 * data.held_out.pixels.movedim(1, -1).numpy()).astype(np.uint8),
        "truth": CLASS_COLORS[data.held_out.labels.numpy()],
        **{arm: CLASS_COLORS[classes.numpy()] for arm, classes in predictions.items()},
    }
    grid = figure.subplots(len(IMAGES_SHOWN), len(columns))
    for row, index in zip(grid, IMAGES_SHOWN, strict=True):
        for axes, (title, pictures) in zip(row, columns.items(), strict=True):
            enlarged = pictures[index].repeat(ENLARGED, 0).repeat(ENLARGED, 1)
            axes.imshow(enlarged, interpolation="none", extent=(0, SIZE, 0, SIZE))
            axes.set_axis_off()
            if index == IMAGES_SHOWN[0]:
                axes.set_title(title.replace(" statistics, ", " statistics,\n"), fontsize=8.5)


def draw_differences(losses: pd.DataFrame, theme: Theme) -> Any:
    """How far the loss of each step is from that of one process, float64 and float32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for axes, dtype in zip(panels, ("float64", "float32"), strict=True):
        rows_of_dtype = losses[(losses["dtype"] == dtype) & (losses.arm != REFERENCE)]
        for arm, rows in rows_of_dtype.groupby("arm", sort=False):
            if arm == IN_PAIRS:  # which is BatchNorm, 4 x 2
                continue
            difference = rows.difference.where(rows.difference > 0.0)
            axes.plot(rows.step, difference, color=color_of(str(arm), theme), linewidth=1)
        axes.set(title=dtype, xlabel="step", yscale="log", ylim=(1e-17, 10))
    panels[0].set_ylabel("|loss - loss of one process| / loss")
    kinds = {
        "SyncBN, any split": theme.ours,
        "BatchNorm": theme.torch,
        "synchronized wrongly": theme.wrong,
        "fixed statistics": theme.fixed,
    }
    handles = [panels[1].plot([], [], color=color, label=kind)[0] for kind, color in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds))
    return figure
