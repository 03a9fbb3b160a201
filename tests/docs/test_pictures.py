"""Pictures of the documents are there for light and dark pages; what is said of the trainings is in
the rows beside them.
"""

import pathlib
import re

import pandas as pd
import pytest

ROOT = next(p for p in pathlib.Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
PICTURES = ROOT / "docs" / "pictures"
PICTURE = re.compile(
    r'<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="(.*)-dark\.svg">\n'
    r'  <img alt=".+" src="(.*)-light\.svg">\n</picture>'
)
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
SHOWN = [
    pytest.param(document, *paths, id=f"{document.name}-{paths[0]}")
    for document in DOCUMENTS
    for paths in PICTURE.findall(document.read_text(encoding="utf-8"))
]
EXACT = "SyncBN, "


@pytest.mark.parametrize(("document", "dark", "light"), SHOWN)
def test_pictures_are_there_in_both_themes(document, dark, light):
    assert dark == light
    for theme in ("light", "dark"):
        assert (document.parent / f"{light}-{theme}.svg").is_file()


def test_every_picture_is_shown():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert text.count("<picture>") == len(SHOWN)
    assert {path.name for path in PICTURES.glob("*.svg")} <= set(re.findall(r"[\w-]+\.svg", text))


@pytest.fixture(scope="module")
def trainings():
    return pd.read_csv(PICTURES / "equivalence.csv")


def test_losses_of_synchronized_ranks_are_those_of_one_process(trainings):
    exact = trainings[(trainings["dtype"] == "float64") & trainings.arm.str.startswith(EXACT)]
    assert len(exact) == 4
    assert (exact.steps >= 100).all()
    assert exact.largest_loss_difference.max() < 1e-8


def test_scores_in_the_documents_are_those_that_were_measured(trainings):
    single = trainings[trainings["dtype"] == "float32"]
    means = 100 * single.groupby("arm").mean_iou.mean()
    text = (ROOT / "docs" / "equivalence.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, +/-]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {arm: float(score) for arm, score in rows} == means.round(1).to_dict()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for arm in ("one process", "BatchNorm, 8 x 1"):
        assert f"{means[arm]:.1f}" in readme
    assert trainings.commit[0] in text
