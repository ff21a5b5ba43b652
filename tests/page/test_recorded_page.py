"""The page in one file with a recorded trace inside: replay, views by link, languages, a phone, keyboard, the dark."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="there is no playwright (pip install playwright)")
from playwright.sync_api import expect

from tools.make_demo_page import demo_page

Open = Callable[..., Any]
VIEWS = ["blocks", "scheduler", "attention", "parallel"]
# What is the same in every language: names, figures, source text, and the texts of requests.
SAME = re.compile(r"^[\W\dA-Z]*$|^nano-vLLM$|^English$|^demo$|^[\d.]+ \w?i?B$|_|^rank$|^Σ$")

VISIBLE_TEXTS = """() => {
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const { parentElement, textContent } = walk.currentNode;
        const isCode = parentElement.closest(".by, .request > p, script, style, .code");
        if (parentElement.checkVisibility() && !isCode) found.push(textContent.trim());
    }
    const labeled = [...document.querySelectorAll("[aria-label], [title]")].filter((one) => one.checkVisibility());
    return [...found, ...labeled.flatMap((one) => [one.ariaLabel, one.title])].filter(Boolean);
}"""


def step_of(page: Any) -> int:
    return int(page.locator("#stat-step").inner_text())


def test_recorded_trace_plays_pauses_and_steps(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=3")
    expect(page.locator("#from")).to_have_text("recorded")
    expect(page.locator("#stat-step")).to_have_text("3")
    page.select_option("#rate", "10")
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("Pause")
    expect(page.locator("#stat-step")).not_to_have_text(re.compile("^[34]$"))
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("Play")
    at = step_of(page)
    page.wait_for_timeout(250)
    assert step_of(page) == at
    page.click("#back")
    expect(page.locator("#stat-step")).to_have_text(str(at - 1))
    page.click("#step")
    expect(page.locator("#stat-step")).to_have_text(str(at))


def test_meters_are_as_long_as_their_figures_say(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=8")
    meters = page.locator("#figures .meter")
    shares = meters.evaluate_all("(all) => all.map((one) => one.firstChild.offsetWidth / one.offsetWidth)")
    figures = [page.locator(f"#stat-{key}").inner_text() for key in ("usage", "hit_rate")]
    assert shares == pytest.approx([int(text.removesuffix(" %")) / 100 for text in figures], abs=0.02)
    assert 0 < min(shares) and max(shares) < 1


def test_model_with_windows_has_a_row_of_blocks_for_each_group_of_layers(open_page: Open, window_demo: str) -> None:
    page = open_page(f"{window_demo}#lang=en&step=40&request=B")
    expect(page.locator(".block-table h4")).to_have_text(
        ["Layer group 1: sees every token"]
        + [f"Layer group {n}: sees the last 48 tokens (sliding window)" for n in (2, 3)]
    )
    rows = page.locator(".block-table .table-row")
    logical = [rows.nth(i).locator(".logical").all_inner_texts() for i in range(3)]
    assert logical[0] == list(map(str, range(len(logical[0])))) and len(logical[0]) == 9
    assert logical[1] == logical[2] == logical[0][5:], "what no token to come sees has gone back"
    page.locator("#cells").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block")).to_contain_text("Block 0: held by A, B, C; tokens 0 to 15")
    expect(page.locator("#block")).to_contain_text("Layer group 1: sees every token.")


def test_buttons_stay_the_same_while_the_page_is_drawn(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=3")
    page.select_option("#rate", "10")
    before = [
        page.locator(place).first.element_handle() for place in ("#toggle", "#rate", "#requests .chip", "#views a")
    ]
    page.click("#toggle")
    expect(page.locator("#stat-step")).not_to_have_text("3")
    assert all(element.evaluate("(element) => element.isConnected") for element in before)


def test_keyboard_goes_through_time_views_and_blocks(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=5")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#stat-step")).to_have_text("6")
    page.keyboard.press("Home")
    expect(page.locator("#stat-step")).to_have_text("1")
    page.keyboard.press("2")
    expect(page.locator("#view-scheduler")).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator("#view-blocks")).to_be_visible()
    page.locator("#cells").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#block")).to_contain_text("Block 1")
    expect(page.locator("#stat-step")).to_have_text("1")  # the arrows have walked in the picture
    page.keyboard.press("Enter")
    expect(page.locator(".block-table h3")).to_contain_text("Block table of")


def test_everything_that_can_be_done_is_reached_by_tab(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=5")
    expect(page.locator("#view-blocks")).to_be_visible()
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.key || ''"))
    assert {
        "language",
        "theme",
        "blocks",
        "parallel",
        "cells",
        "events",
        "scrub",
        "back",
        "toggle",
        "step",
        "rate",
    } <= reached


def test_link_opens_its_view_and_step(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#view=parallel&lang=en&step=9")
    expect(page.locator("#view-parallel")).to_be_visible()
    expect(page.locator("#stat-step")).to_have_text("9")
    for number, view in enumerate(VIEWS, 10):
        page.goto(f"{demo}#view={view}&lang=en&step={number}")
        expect(page.locator(f"#view-{view}")).to_be_visible()
        expect(page.locator("#views [aria-current]")).to_have_attribute("href", re.compile(f"view={view}"))
        expect(page.locator("#stat-step")).to_have_text(str(number))
        assert page.locator(".view:visible").count() == 1


def test_attention_shows_the_slots_that_the_block_table_gives(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#view=attention&lang=en&step=20&request=B")
    said = page.locator("#view-attention .slots").inner_text()
    block, slot = map(int, re.fullmatch(r"block (\d+): slot (\d+)", said.strip()).groups())
    position = int(re.search(r"position (\d+)", page.locator("#view-attention").inner_text())[1])
    assert slot == block * 16 + position % 16
    assert page.locator(".fills .physical").nth(position // 16).inner_text() == str(block)


def test_parallel_layers_count_the_bytes_of_the_step(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#view=parallel&lang=en&step=1")
    expect(page.locator(".answer")).to_contain_text(
        "64 × 256 × 2 bytes = 32.0 KiB; two a layer, 8 layers: 512 KiB a step"
    )
    page.select_option("[data-key=ranks]", "4")
    expect(page.locator("#view-parallel")).to_contain_text("768 KiB")


def test_no_english_is_left_in_the_chinese_page(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#view=blocks&lang=zh&step=20")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    for number, view in enumerate(VIEWS, 1):
        page.keyboard.press(str(number))
        expect(page.locator(f"#view-{view}")).to_be_visible()
        texts = page.evaluate(VISIBLE_TEXTS)
        assert len(texts) > 40
        assert [text for text in texts if not re.search("[一-鿿]", text) and not SAME.search(text)] == []


def test_language_follows_the_browser_and_the_switch(open_page: Open, demo: str) -> None:
    page = open_page(demo, locale="zh-CN")
    expect(page.locator("#toggle")).to_have_text("播放")
    page.click("#language")
    expect(page.locator("#toggle")).to_have_text("Play")
    expect(page).to_have_url(re.compile("lang=en"))


def test_phone_has_nothing_beside_its_screen(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=20", viewport={"width": 360, "height": 740})
    for language, view in product(("en", "zh"), VIEWS):
        page.goto(f"{demo}#view={view}&lang={language}&step=20")
        expect(page.locator(f"#view-{view}")).to_be_visible()
        expect(page.locator("#toggle")).to_have_text({"en": "Play", "zh": "播放"}[language])
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_follows_the_system_and_the_switch(open_page: Open, demo: str) -> None:
    page = open_page(demo, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.click("#theme")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert dark == "rgb(18, 21, 26)" and page.evaluate(paper) == "rgb(246, 247, 249)"


def test_nothing_moves_by_itself_for_readers_who_want_no_motion(open_page: Open, demo: str) -> None:
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
    assert open_page(demo).evaluate(moving) > 0
    assert open_page(demo, reduced_motion="reduce").evaluate(moving) == 0


def test_hidden_tab_stops_the_replay(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=3")
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("Pause")
    show = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    show += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(show, True)
    page.evaluate(show, False)
    expect(page.locator("#toggle")).to_have_text("Play")


def test_event_opens_the_source_of_its_function(open_page: Open, demo: str) -> None:
    page = open_page(f"{demo}#lang=en&step=74")
    page.locator(".event.preempt .by").first.click()
    expect(page.locator("#source pre")).to_contain_text("victim = self.running.pop()")
    expect(page.locator("#source")).to_contain_text("engine/scheduler.py, line")
    page.keyboard.press("Escape")
    expect(page.locator("#source")).to_be_hidden()


def test_trace_file_is_opened_and_another_file_refused(
    open_page: Open, demo: str, trace_text: str, tmp_path: Path
) -> None:
    page = open_page(f"{demo}#lang=en")
    lines = trace_text.splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(lines[:14]))
    (tmp_path / "wrong.jsonl").write_text("\n".join([lines[0], "{}"]))
    page.set_input_files("#file", tmp_path / "wrong.jsonl")
    expect(page.locator("#notice")).to_contain_text("This is no trace. Line 2: kind undefined")
    page.set_input_files("#file", tmp_path / "short.jsonl")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#scrub")).to_have_attribute("max", "2")


def test_text_of_a_trace_cannot_end_the_element_that_holds_it(open_page: Open, trace_text: str, tmp_path: Path) -> None:
    path = tmp_path / "demo.html"
    path.write_text(demo_page(trace_text.replace("def mean(values):", "</script><b id=x>")), encoding="utf-8")
    page = open_page(f"{path.as_uri()}#lang=en")
    expect(page.locator("#requests")).to_contain_text("</script><b id=x>")
    assert page.locator("#x").count() == 0
