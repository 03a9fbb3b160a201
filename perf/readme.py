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


def write_block(frame: pd.DataFrame, readme: pathlib.Path) -> None:
    """Put the summary of a GPU's rows between the markers.

    Raises ValueError if the rows were not measured on a GPU, if any is wrong, if there is nothing
    to compare, or if the README has no markers.
    """
    if frame.gpu.isna().any():
        raise ValueError(f"{readme.name} shows figures of a GPU: expected its rows, got a CPU's")
    if not (frame.error_over_tolerance <= 1.0).all():
        raise ValueError(f"{readme.name} shows what is right: expected no wrong row")
    if not has_ours(frame):
        raise ValueError("expected rows of ours, and of what it is held against")
    text = readme.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise ValueError(f"{readme}: expected <!-- compare --> and <!-- /compare --> once")
    summary = f"{headline(frame)}\n\nThe layers are those of [perf/shapes.csv](perf/shapes.csv). "
    filled = BLOCK.sub(lambda match: match[1] + summary + where(frame) + match[2], text)
    readme.write_text(filled, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Fill the README from a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=pathlib.Path)
    options = parser.parse_args(arguments)
    try:
        write_block(read_rows(options.csv), README)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
