"""Pictures for the documents: each is written twice, for light pages and for dark ones."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

WIDTH = 8.6  # inches: at 96 dots an inch what GitHub shows, so that letters keep their size


class Theme(NamedTuple):
    """Colours: of a page, of what is written and drawn on it, and of what is compared."""

    page: str
    ink: str
    faint: str
    ours: str
    torch: str
    wrong: str
    fixed: str
    other: str


THEMES = {
    "light": Theme(
        *("#ffffff", "#1f2328", "#d1d9e0"),
        ours="#0969da",
        torch="#d1570a",
        wrong="#a0308f",
        fixed="#7a6a00",
        other="#59636e",
    ),
    "dark": Theme(
        *("#0d1117", "#f0f6fc", "#3d444d"),
        ours="#58a6ff",
        torch="#ffa657",
        wrong="#f778ba",
        fixed="#d9c64a",
        other="#9198a1",
    ),
}


def write_pictures(draw: Callable[[Theme], Any], folder: pathlib.Path, name: str) -> list[str]:
    """Call draw(theme) for each theme, write its figures, name-light.svg and name-dark.svg, and
    return their paths.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for theme_name, theme in THEMES.items():
        settings: dict[Any, Any] = {
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.faint,
            "grid.linewidth": 0.5,
            "legend.frameon": False,
            "svg.hashsalt": name,  # the same picture is the same file
            "figure.facecolor": theme.page,
            "axes.facecolor": theme.page,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                theme.ink,
            ),
        }
        file = folder / f"{name}-{theme_name}.svg"
        with matplotlib.rc_context(settings):
            draw(theme).savefig(file, metadata={"Date": None})
        files.append(str(file))
    return files
