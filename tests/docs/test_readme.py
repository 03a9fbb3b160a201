"""What the README and docs/ say: programs run, links lead somewhere, signatures are those of the
code, figures those that were measured.
"""

import importlib.util
import inspect
import pathlib
import re

import pytest

import triton_syncbn
from tests.support.torchrun import printed_on_two_ranks

ROOT = next(p for p in pathlib.Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
README = ROOT / "README.md"
API = ROOT / "docs" / "api.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]*)\)")
ACCURACY_LINK = re.compile(r"\(([\w/]*ACCURACY\.md)\)")

PROGRAMS = {
    f"{document.name}-{number}": program
    for document in DOCUMENTS
    for number, program in enumerate(PROGRAM.findall(document.read_text(encoding="utf-8")))
}
LINKS = [
    pytest.param(document, link, id=f"{document.name}-{link}")
    for document in DOCUMENTS
    for link in LINK.findall(document.read_text(encoding="utf-8"))
]


def on_two_ranks(program: str) -> bool:
    return "torchrun --nproc-per-node=2" in program.splitlines()[0]


def libraries_missing(program: str) -> list[str]:
    """What a program imports and this environment has not."""
    imports = [line for line in program.splitlines() if re.match("(import|from) ", line)]
    names = {
        module.split()[0].partition(".")[0]
        for line in imports
        for module in line.split(" ", 1)[1].partition(" import ")[0].split(",")
    }
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def assert_statistics_are_the_same(printed: str) -> None:
    ranks = dict(re.findall(r"rank (\d): (\[.*?\])", printed))
    assert set(ranks) == {"0", "1"}
    assert ranks["0"] == ranks["1"]
    assert ranks["0"] != str([0.0] * 8)


def assert_layers_are_named(printed: str) -> None:
    for layer in ("first", "second"):
        assert f"SyncBN layer '{layer}': in its forward, call 1 of this rank, other" in printed


def assert_groups_are_shown(printed: str) -> None:
    lines = printed.split("SyncB")[1:]  # of SyncBN and SyncBatchNorm2d
    assert len(lines) in (2, 4)
    assert all("process_group=ranks [0, 1])" in line for line in lines)


WHAT_TWO_RANKS_PRINT = {
    "train.py": assert_statistics_are_the_same,
    "out_of_step.py": assert_layers_are_named,
    "groups.py": assert_groups_are_shown,
    "node.py": assert_groups_are_shown,
    "shard.py": assert_statistics_are_the_same,
    "fit.py": assert_statistics_are_the_same,
    "prepare.py": assert_statistics_are_the_same,
    "trainer.py": assert_statistics_are_the_same,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_run_as_they_stand(program, tmp_path, plain_torch):
    if missing := libraries_missing(program):
        pytest.skip(f"needs {', '.join(missing)}")
    if not on_two_ranks(program):
        exec(compile(program, "program", "exec"), {})
        return
    name = program.split(",")[0].removeprefix("# ")
    file = tmp_path / name
    file.write_text(program, encoding="utf-8")
    WHAT_TWO_RANKS_PRINT[name](printed_on_two_ranks(file))


def test_programs_are_found():
    names = {program.split(",")[0].removeprefix("# ") for program in PROGRAMS.values()}
    assert names > set(WHAT_TWO_RANKS_PRINT)


def anchors(document: pathlib.Path) -> set[str]:
    """The names that a link can give to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "link"), LINKS)
def test_links_lead_to_a_file_and_its_heading(document, link):
    path, _, anchor = link.partition("#")
    assert not path.startswith("http"), "links to other places cannot be checked here"
    target = document.parent / path if path else document
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def plain(signature: inspect.Signature) -> str:
    """A signature without types, as docs/api.md writes it."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize("name", sorted(set(triton_syncbn.__all__) - {"__version__"}))
def test_every_public_name_is_explained_with_its_signature(name):
    section = re.search(
        rf"^## {name}\n\n```\n{name}(.*?)```\n", API.read_text(encoding="utf-8"), re.S | re.M
    )
    assert section, f"docs/api.md: expected a section {name} that begins with its signature"
    actual = inspect.signature(getattr(triton_syncbn, name))
    assert " ".join(section[1].split()) == plain(actual)


def test_figures_of_accuracy_are_those_that_were_measured():
    """README: ours and torch's y and dx; ACCURACY.md: kernels, CPU, plain torch, torch, ratio."""
    text = README.read_text(encoding="utf-8")
    measured = (ROOT / ACCURACY_LINK.search(text)[1]).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w/ =]+) \| y \|(.*)\|\n\|  \| dx \|(.*)\|$", measured, re.MULTILINE)
    known = {
        case: [cells.split("|")[column].strip() for cells in (y, dx) for column in (0, 3)]
        for case, y, dx in rows
    }
    shown = re.findall(r"^\| ([\w/ =]+) \|((?: \d\.\de-\d\d \|){4})$", text, re.MULTILINE)
    assert len(shown) == 4
    for case, cells in shown:
        assert cells.replace("|", "").split() == known[case], case
    y_ours, y_torch = known["mean / std = 1e4"][:2]
    assert f"| {y_torch} (`BatchNorm2d`, on a CPU) | {y_ours} |" in text
    assert re.search(r"commit (\w+)", measured)[1] in text
