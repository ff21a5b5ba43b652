"""The tool that puts the page and a trace into one file: what it refuses, and that docs/demo.html is its work."""

import re

import pytest

from tools.make_demo_page import DEMO, PAGE, TRACE, as_function, demo_page


def test_demo_page_refuses_what_it_cannot_put_into_one_file(trace_text: str) -> None:
    with pytest.raises(ValueError, match="at most 1500000 are allowed"):
        demo_page(trace_text * 40)
    with pytest.raises(ValueError, match="neither an import of names"):
        as_function("x.js", 'import * as all from "./y.js";\n')


@pytest.mark.skipif(not TRACE.exists(), reason="there is no docs/traces/demo.jsonl")
def test_demo_page_of_the_docs_is_the_page_of_now() -> None:
    made = demo_page(TRACE.read_text(encoding="utf-8"))
    assert made == DEMO.read_text(encoding="utf-8"), "run python tools/make_demo_page.py"


def test_demo_page_needs_no_other_file(trace_text: str) -> None:
    assert not re.search(r'(?:src|href)="(?!data:)[^#"]', demo_page(trace_text))


def test_every_module_of_the_page_is_in_the_demo_page(trace_text: str) -> None:
    page = demo_page(trace_text)
    modules = [path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*.js")]
    assert len(modules) > 15
    assert [name for name in modules if f'modules["{name}"] = (' not in page] == []
