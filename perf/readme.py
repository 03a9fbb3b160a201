"""The block of the README that figures of a GPU fill, and nothing else does.

`python perf/readme.py rows.csv` fills it from the rows that compare.py wrote on another machine.
"""

import argparse
import pathlib
import re
import sys

import pandas as pd
from machine.environment import ROOT
from report.tables import has_ours, headline, read_rows, where

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- compare -->\n).*?(\n<!-- /compare -->)", re.DOTALL)


def filled(readme: str, frame: pd.DataFrame) -> str:
    """The text with the summary of a GPU's rows between its markers.

    Raises ValueError if the rows were not measured on a GPU, if any is wrong, or if there is
    nothing to compare.
    """
    if frame.gpu.isna().any():
        raise ValueError("the README shows figures of a GPU: expected its rows, got a CPU's")
    if not (frame.error_over_tolerance <= 1.0).all():
        raise ValueError("the README shows what is right: expected no wrong row")
    if not has_ours(frame):
        raise ValueError("expected rows of ours, and of what it is held against")
    summary = (
        f"{headline(frame)}\n\nThe layers are those of [perf/shapes.csv](perf/shapes.csv). "
        f"{where(frame)}"
    )
    return BLOCK.sub(lambda match: match[1] + summary + match[2], readme)


def main(arguments: list[str] | None = None) -> int:
    """Fill the README from a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        text = filled(README.read_text(encoding="utf-8"), read_rows(options.csv))
    except ValueError as error:
        parser.error(str(error))
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
