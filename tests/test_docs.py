"""What the documents promise of themselves: links lead somewhere, figures are in the notebook, the route is short."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import draw_step, readme_tables

ROOT = Path(__file__).parents[1]
README, NOTEBOOK = ROOT / "README.md", ROOT / "docs" / "lab-notebook.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)*(?!\w|\.\d)")
COMMIT = re.compile(r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b")
SOURCE = re.compile(r"`((?:\w+/)+\w+\.py)`")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(text: str, begin: str, end: str) -> str:
    assert text.count(begin) == 1, begin
    return text.partition(begin)[2].partition(end)[0]


def numbers(text: str) -> set[str]:
    """The numbers of a text, as they are written; those inside words (H100) left out."""
    return {number.rstrip(",.") for number in NUMBER.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link and not link.startswith("mailto:")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    if page.name == "vllm.md":
        return  # which names vLLM's examples
    roots = (ROOT / "nanovllm", ROOT)
    missing = [file for file in SOURCE.findall(page.read_text()) if not any((root / file).exists() for root in roots)]
    assert not missing


def test_every_figure_of_the_readme_is_in_the_notebook_with_its_command() -> None:
    figures = section(README.read_text(), "<!-- figures -->", "<!-- /figures -->")
    noted = section(NOTEBOOK.read_text(), "## The README's figures", "\n## ")
    assert len(numbers(figures)) > 30
    assert not numbers(figures) - numbers(noted)
    rows = [line for line in noted.splitlines() if line.startswith("| ") and not line.startswith(("| figure", "| ---"))]
    without_command = [row for row in rows if "bench.py" not in row.rsplit(" | ", 1)[1] and "same with" not in row]
    assert not without_command


def test_every_figure_of_the_performance_page_is_in_the_notebook() -> None:
    text = section((ROOT / "docs" / "performance.md").read_text(), "## Figures", "## Method")
    assert not numbers(text) - numbers(NOTEBOOK.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if page != NOTEBOOK], ids=name)
def test_commit_ids_are_in_the_notebook_alone(page: Path) -> None:
    assert not COMMIT.findall(page.read_text())


def test_the_tables_of_the_readme_are_what_the_tool_writes() -> None:
    text = README.read_text()
    assert text == readme_tables.with_tables(text)


def test_the_afternoon_is_at_most_2000_lines() -> None:
    assert readme_tables.total_lines() <= readme_tables.MOST_LINES


def test_a_missing_file_of_the_afternoon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_tables, "AFTERNOON", [("llm.py", ""), ("no/such_file.py", "")])
    with pytest.raises(FileNotFoundError, match=r"nanovllm/no/such_file\.py"):
        readme_tables.afternoon_table()


def test_the_picture_of_a_step_is_what_the_script_draws() -> None:
    assert draw_step.TARGET.read_text(encoding="utf-8") == draw_step.draw()
    ElementTree.fromstring(draw_step.draw())


def test_every_file_in_the_picture_exists() -> None:
    files = [box.file for box in draw_step.BOXES if box.file]
    assert len(files) > 5
    assert not [file for file in files if not (ROOT / "nanovllm" / file).exists()]


def test_a_picture_whose_boxes_overlap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = draw_step.Box(draw_step.ROWS.x + 10, draw_step.ROWS.y + 10, 100, 40, draw_step.HOST, "moved")
    monkeypatch.setattr(draw_step, "BOXES", [*draw_step.BOXES, moved])
    with pytest.raises(ValueError, match="'rows' and 'moved' overlap"):
        draw_step.draw()
