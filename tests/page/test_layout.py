"""docs/demo.html at every width: no label is squeezed, and no texts lie on each other."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("playwright", reason="there is no playwright (pip install playwright)")
from playwright.sync_api import expect

from tools.make_demo_page import DEMO

PAGE = DEMO.as_uri()
VIEWS = ["blocks", "scheduler", "attention", "parallel"]
# Labels of more lines than two, and texts of a drawing that lie on each other.
BADLY_LAID_OUT = """() => {
    const squeezed = [...document.querySelectorAll("button, summary, label")].filter(
        (one) => one.checkVisibility() && one.getBoundingClientRect().height > 60);
    const drawn = [...document.querySelectorAll("svg")].flatMap((svg) => {
        const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
            Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4).map(([b]) => `${a} / ${b}`));
    });
    return [...squeezed.map((one) => one.textContent), ...drawn];
}"""


@pytest.mark.parametrize("width", [360, 820, 1280, 1900])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_label_is_squeezed_and_no_texts_lie_on_each_other(
    open_page: Callable[..., Any], lang: str, width: int
) -> None:
    page = open_page(f"{PAGE}#lang={lang}&step=8", viewport={"width": width, "height": 800})
    for view in VIEWS:
        page.goto(f"{PAGE}#lang={lang}&step=8&view={view}")
        expect(page.locator(f"#view-{view}")).to_be_visible()
        assert page.evaluate(BADLY_LAID_OUT) == []
