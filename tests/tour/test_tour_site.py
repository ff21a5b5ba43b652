"""The pages build as a site without a warning, and the site asks nothing from outside."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.tour_site import LINK, on_page_markdown

ROOT = Path(__file__).parents[2]


class Page:
    class file:
        src_uri = "tour/02_blocks.md"


def test_on_the_site_a_link_to_a_source_file_becomes_its_text_and_others_stay() -> None:
    text = "[a](../../nanovllm/llm.py) [b](03.md) [c](../glossary.md#steps) [d](https://example.org/) [e](../../x.md)"
    assert LINK.findall(on_page_markdown(text, page=Page)) == [
        ("b", "03.md"),
        ("c", "../glossary.md#steps"),
        ("d", "https://example.org/"),
    ]


def test_on_the_site_answers_are_markdown_and_a_list_may_follow_text() -> None:
    page = on_page_markdown("Three things:\n- one\n- two\n\n<details>\n\n1. yes\n\n</details>\n", page=Page)
    assert "Three things:\n\n- one\n- two\n" in page
    assert '<details markdown="1">' in page


@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("material") is None, reason="mkdocs-material is missing")
def test_the_site_builds_strictly_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    for item in ("docs", "tools"):
        shutil.copytree(ROOT / item, tmp_path / item)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    demo = tmp_path / "docs" / "demo.html"  # the recorded page, where it is not there yet
    if not demo.exists():
        demo.write_text("<p>demo", encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site" / "tour").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://', html), page
        assert re.search(r'<link rel="stylesheet" href="(\.\./)?site.css">', html), "code fits into the column"
