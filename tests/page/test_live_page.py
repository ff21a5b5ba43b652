"""The page on a server: the chat, the feed, the controls. A stub stands for the server, and a real browser looks."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="there is no playwright (pip install playwright)")
from playwright.sync_api import expect

Open, Serve = Callable[..., Any], Callable[..., Any]


def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds. Fails after fifteen seconds."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cells(page: Any) -> str:
    """What the picture of the blocks says of itself."""
    return page.locator("#cells").get_attribute("aria-label")


def test_page_streams_an_answer_while_its_blocks_appear_and_go(open_page: Open, serve: Serve) -> None:
    stub = serve()
    page = open_page(f"{stub.url}#lang=en")
    page.fill("#ask", "What is in a block?")
    page.keyboard.press("Enter")
    expect(page.locator(".chat-log .assistant .text")).to_have_text("A block holds keys and values. 你好")
    expect(page.locator(".chat-log .assistant .chip")).to_have_text("A")  # the request whose blocks are this answer's
    expect(page.locator("#requests .request")).to_have_class(re.compile("finished"))
    expect(page.locator("#cells")).to_have_attribute("aria-label", re.compile("0 used.*cached"))
    page.keyboard.press("Escape")
    page.locator("#scrub").focus()
    page.keyboard.press("Home")
    expect(page.locator("#cells")).to_have_attribute("aria-label", re.compile(r"3 used.*A: 3\."))
    assert stub.posts[0][1]["stream"] is True


def test_shared_prefixes_are_counted_as_shared(open_page: Open, serve: Serve) -> None:
    page = open_page(f"{serve().url}#lang=en")
    page.click("#scene-shared")
    expect(page.locator("#cells")).to_have_attribute("aria-label", re.compile("3 of them shared"))


def test_pause_step_slow_motion_and_scenes_reach_the_server(open_page: Open, serve: Serve) -> None:
    stub = serve()
    page = open_page(f"{stub.url}#lang=en")
    page.click("#scene-fill")
    expect(page.locator("#stat-step")).to_have_text("1")
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("Resume")
    expect(page.locator("#from")).to_have_text("paused")
    page.click("#step")
    expect(page.locator("#stat-step")).to_have_text("2")
    page.select_option("#slow", "300")
    expect(page.locator("#slow")).to_have_value("300")
    until(lambda: len(stub.posts) == 4)
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("Pause")
    actions = [{"action": "pause"}, {"action": "step"}, {"action": "slow", "delay_ms": 300}, {"action": "resume"}]
    assert stub.posts == [("scene", {"scene": "fill"})] + [("control", action) for action in actions]


def test_keyboard_commands_the_engine_like_the_buttons(open_page: Open, serve: Serve) -> None:
    stub = serve()
    page = open_page(f"{stub.url}#lang=en")
    page.click("#scene-long")
    expect(page.locator("#stat-step")).to_have_text("1")
    page.locator("#main").focus()
    page.keyboard.press(" ")
    expect(page.locator("#toggle")).to_have_text("Resume")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#stat-step")).to_have_text("2")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#stat-step")).to_have_text("1")
    expect(page.locator("#from")).to_have_text("looking back")
    page.keyboard.press("ArrowRight")  # forward in what is remembered: the engine takes no step for it
    expect(page.locator("#stat-step")).to_have_text("2")
    assert [body.get("action") for _, body in stub.posts] == [None, "pause", "step"]


def test_controls_of_the_engine_are_missing_where_it_may_not_be_commanded(open_page: Open, serve: Serve) -> None:
    stub = serve(teach=False)
    page = open_page(f"{stub.url}#lang=en")
    expect(page.locator("#toggle")).to_have_text("Hold")
    assert page.locator("#scene-shared, #slow, #clear").count() == 0
    page.click("#toggle")
    expect(page.locator("#toggle")).to_have_text("To the newest")
    assert stub.posts == []


def test_refusal_of_the_server_is_shown(open_page: Open, serve: Serve) -> None:
    page = open_page(f"{serve().url}#lang=en", allowed="400 (Bad Request)")
    page.click("#clear")
    expect(page.locator("#notice")).to_have_text("The server refused: nothing to clear")


def test_whoever_comes_first_is_told_what_to_do_and_then_what_to_look_at(open_page: Open, serve: Serve) -> None:
    page = open_page(f"{serve().url}#lang=en")
    hint = page.locator("#hint")
    expect(hint).to_contain_text("buttons at the foot of the page")
    page.click("#scene-shared")
    expect(hint).to_contain_text("watch the striped blocks")
    page.click("#language")
    expect(hint).to_contain_text("前缀命中")
    page = open_page(f"{serve(teach=False).url}#lang=en")
    expect(page.locator("#hint")).to_contain_text("the page shows no texts")


def test_engine_that_ends_and_is_started_again_is_told_of(open_page: Open, serve: Serve) -> None:
    stub = serve()
    page = open_page(f"{stub.url}#lang=en")
    page.click("#scene-shared")
    expect(page.locator("#requests .request")).to_have_count(10)
    httpx.get(f"{stub.url}end")
    expect(page.locator("#from")).to_have_text("no connection")
    expect(page.locator("#notice")).to_have_text("The engine has ended, and is being started again.")
    expect(page.locator("#requests .request")).to_have_count(10)
    httpx.get(f"{stub.url}start")
    expect(page.locator("#from")).to_have_text("live")
    expect(page.locator("#notice")).to_contain_text("was started again")
    expect(page.locator("#cells")).to_have_attribute("aria-label", re.compile("0 used"))
    assert page.locator("#requests .request").count() == 0


def test_hidden_tab_closes_the_feed_and_a_shown_one_opens_it_again(open_page: Open, serve: Serve) -> None:
    stub = serve()
    page = open_page(stub.url)
    until(lambda: stub.viewers == 1)
    show = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    show += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(show, True)
    until(lambda: stub.viewers == 0)
    page.evaluate(show, False)
    until(lambda: stub.viewers == 1)


def test_page_asks_for_the_api_key_and_sends_it(open_page: Open, serve: Serve) -> None:
    stub = serve(key="secret")
    page = open_page(f"{stub.url}#lang=en", allowed="401 (Unauthorized)")
    page.fill("#key-input", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_visible()
    page.fill("#key-input", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#from")).to_have_text("live")
    until(lambda: stub.viewers == 1)


def test_saved_trace_opens_again(open_page: Open, serve: Serve, tmp_path: Any) -> None:
    stub = serve()
    page = open_page(f"{stub.url}#lang=en")
    page.click("#scene-shared")
    page.click("#step")
    expect(page.locator("#stat-step")).to_have_text("2")
    blocks = cells(page)
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / "saved.jsonl"
    download.value.save_as(path)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()][0] == "head"
    page.set_input_files("#file", path)
    expect(page.locator("#from")).to_have_text("recorded")
    page.locator("#scrub").focus()
    page.keyboard.press("End")
    expect(page.locator("#stat-step")).to_have_text("2")
    assert cells(page) == blocks
