"""docs/support.md: every row of the table is held by a test that there is."""

import ast
import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs" / "support.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| |")
]


def functions_of(file: pathlib.Path) -> set[str]:
    module = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in module.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_names_a_test(row):
    *_, test = row
    assert len(row) == 4
    path, name = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", test).groups()
    assert (TESTS / path).is_file()
    assert name in functions_of(TESTS / path)


def test_rows_are_found():
    assert len(ROWS) > 30
    subjects = [row[0] for row in ROWS]
    assert len(set(subjects)) == len(subjects)


@pytest.mark.parametrize(
    "file", re.findall(r"`([\w/]+\.py)`", DOCUMENT.read_text(encoding="utf-8"))
)
def test_other_files_that_are_named_exist(file):
    assert (TESTS / file).is_file()
