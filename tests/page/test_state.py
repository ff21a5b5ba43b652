"""What the page keeps of a trace: a state that agrees with itself, and a history that one can go back in."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sample_trace import BLOCK_SIZE, Engine, head, sample_trace
from stub_server import Stub, serving

from nanovllm.kernels.attention.decode_splits import DecodeSplits, split_contexts_reference

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(browser: Any) -> Iterator[Run]:
    """`run(body, argument)`: a JavaScript function body with the page's modules as `state`, `history`, … in scope."""
    names = ["state", "pool", "history", "replay", "splits", "i18n", "cells"]
    load = ", ".join(f"import('/page/{name}.js')" for name in names)

    with serving(Stub()) as stub:
        page = browser.new_page()
        page.goto(f"{stub.url}page/style.css")

        def run(body: str, argument: Any = None) -> Any:
            modules = f"const [{', '.join(names)}] = await Promise.all([{load}]);"
            return page.evaluate(f"async (given) => {{ {modules} {body} }}", argument)

        yield run
        page.close()


def random_trace(seed: int) -> list[dict[str, Any]]:
    """A crowd of requests of all lengths on a cache that is too small for them."""
    engine = Engine(num_blocks=24, seed=seed)
    objects = [head(24)]
    for _ in range(14):
        objects.append(
            engine.add(engine.random.randrange(1, 200), engine.random.randrange(1, 60), engine.random.choice([0, 0, 1]))
        )
        objects += [engine.step() for _ in range(engine.random.randrange(6))]
    while engine.alive:
        objects.append(engine.step())
    return [*objects, engine.step()]


FAULTS = """
    const now = state.emptyState(), faults = [];
    for (const object of given) {
        state.apply(now, object);
        if (object.kind === "step") faults.push(...state.findFaults(now).map((fault) => `${object.n}: ${fault}`));
    }
    return faults;
"""


def test_used_blocks_have_running_owners_and_usage_agrees_after_every_step(run: Run) -> None:
    traces = [random_trace(seed) for seed in range(5)]
    assert sum(trace[-1]["stats"]["preemptions"] for trace in traces) > 3
    for trace in traces:
        assert run(FAULTS, trace) == []


def test_a_trace_that_disagrees_with_itself_is_noticed(run: Run) -> None:
    trace = list(sample_trace())[:14]
    trace[-1] = {**trace[-1], "tables": [["Z", 0, 0, 0, [38]]], "running": []}
    faults = run(FAULTS, trace)
    assert faults[0].endswith(": block 38: its owner Z is not running") and len(faults) == 2 and "usage" in faults[1]


def test_block_table_has_a_block_for_every_computed_token(run: Run) -> None:
    body = """
        const now = state.emptyState(), tables = [];
        for (const object of given) {
            state.apply(now, object);
            if (object.kind !== "step") continue;
            for (const [name, , first, count] of now.batch) {
                const logical = pool.blockTables(now, name)[0].map(([i]) => i);
                if (now.running.includes(name)) tables.push([first + count, logical]);
            }
        }
        return tables;
    """
    tables = run(body, list(sample_trace()))
    assert len(tables) > 100
    for computed, logical in tables:
        assert logical == list(range(len(logical))) and len(logical) * BLOCK_SIZE >= computed


def test_going_back_shows_what_was_shown_then(run: Run) -> None:
    body = """
        const all = history.createHistory(), now = state.emptyState(), then = [];
        const picture = (one) => JSON.stringify([one.n, one.blocks, one.running, [...one.requests]]);
        for (const object of given) {
            history.add(all, object);
            state.apply(now, object);
            if (object.kind === "step") then.push(picture(now));
        }
        const order = then.map((_, i) => (i * 37) % then.length);  // back and forth
        return [then.length, order.filter((i) => picture(history.stateAt(all, i)) !== then[i])];
    """
    assert run(body, random_trace(1)) == [len([o for o in random_trace(1) if o["kind"] == "step"]), []]


def test_long_history_forgets_its_oldest_steps_and_keeps_the_others_right(run: Run) -> None:
    body = """
        const all = history.createHistory(100), now = state.emptyState(), then = new Map();
        for (const object of given) {
            history.add(all, object);
            state.apply(now, object);
            if (object.kind === "step") then.set(now.n, JSON.stringify(now.blocks));
        }
        const wrong = all.frames.filter((frame, i) =>
            JSON.stringify(history.stateAt(all, i).blocks) !== then.get(frame.step.n));
        const copy = replay.readTrace(history.traceText(all));
        return [then.size, all.frames.length, wrong.length, JSON.stringify(copy.latest.blocks) === then.get(now.n),
            copy.frames.length];
    """
    steps, kept, wrong, same, copied = run(body, random_trace(2))
    assert steps > 150 and 30 < kept <= 100 and (wrong, same, copied) == (0, True, kept)


def test_large_batches_are_forgotten_sooner(run: Run) -> None:
    body = """
        const all = history.createHistory(4096, 600), most = [];
        for (const object of given) {
            history.add(all, object);
            most.push(all.frames.reduce((sum, frame) => sum + frame.step.batch.length, 0));
        }
        return [Math.max(...most), all.frames.length, history.stateAt(all, 0).n === all.frames[0].step.n];
    """
    most, kept, is_right = run(body, random_trace(2))
    assert most <= 600 and kept > 30 and is_right


@pytest.mark.parametrize(
    ("text", "message"),
    [("nonsense", "1: "), ('{"kind": "head", "format": "other"}', "1: format other"), ("", "0 steps")],
)
def test_file_that_is_no_trace_is_refused_by_line(run: Run, text: str, message: str) -> None:
    body = "try { replay.readTrace(given); return 'read'; } catch (error) { return error.message; }"
    assert run(body, text).startswith(message)


def test_splits_are_those_of_the_kernel(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for multiprocessors in (8, 36, 80, 132):
        for heads in (1, 4, 8):
            for num_seqs in (1, 3, 40):
                lens = torch.randint(1, 9000, (num_seqs,), generator=generator).tolist()
                cases.append((lens, heads, multiprocessors))
    found = run("return given.map((one) => splits.splitContexts(...one).map((s) => [s.seq, s.begin, s.end]));", cases)
    for (lens, heads, multiprocessors), ours in zip(cases, found, strict=True):
        target = -(-3 * multiprocessors // heads)
        splits = DecodeSplits.allocate(len(lens), heads, heads, 16, "cpu", target_splits=target)
        splits.multiprocessors = multiprocessors
        table = split_contexts_reference(torch.tensor(lens, dtype=torch.int32), heads, splits).table
        assert ours == [row[:3] for row in table.tolist() if row[0] >= 0]


def test_every_word_is_in_both_languages(run: Run) -> None:
    body = """
        const said = {};
        for (const language of i18n.LANGUAGES) {
            i18n.setLanguage(language);
            said[language] = i18n.KEYS.map((key) => i18n.say(key));
        }
        return said;
    """
    said = run(body)
    assert len(said["en"]) == len(said["zh"]) > 100
    chinese = re.compile("[一-鿿]")
    assert {text for text in said["en"] if chinese.search(text)} == {"中文", "Language: 中文"}
    assert {text for text in said["zh"] if not chinese.search(text)} == {"English"}


def test_4500_blocks_are_drawn_within_a_frame(run: Run) -> None:
    engine = Engine(num_blocks=4500)
    trace = [head(4500), *[engine.add(700, 20, prefix=320) for _ in range(16)]]
    trace += [engine.step() for _ in range(40)]
    body = """
        const now = state.emptyState();
        for (const object of given) state.apply(now, object);
        document.body.innerHTML = "<span id='probe'></span><div style='width: 900px'><canvas></canvas></div>";
        const canvas = document.querySelector("canvas"), begun = performance.now();
        for (let i = 0; i < 10; i += 1) cells.drawCells(canvas, now, {});
        const heights = [4500, 70000].map((count) => cells.layoutCells(900, count).height);
        const { size } = cells.layoutCells(900, 4500);
        return [(performance.now() - begun) / 10, size, pool.countBlocks(now).used, heights];
    """
    ms, size, used, heights = run(body, json.loads(json.dumps(trace)))
    assert ms < 50 and size >= 7 and used > 100
    assert heights[0] <= 420 and heights[1] <= 720, "what stands below the blocks can be reached, whatever their number"
