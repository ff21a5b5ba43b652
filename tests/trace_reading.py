"""Reads traces as a page does, and says what any reader may rely on."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

WHAT = {"arrive", "admit", "hit", "chunk", "preempt", "evict", "finish", "abort"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [thing for thing in trace if thing["kind"] == "step"]


def events(trace: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [event for step in steps(trace) for event in step["events"] if event["what"] == what]


def apply(step: dict[str, Any], tables: dict[str, dict[int, list[int]]], digests: dict[int, str]) -> None:
    """Change block tables, by request and group of layers, and digests, by block, as the step says."""
    if step.get("full"):
        tables.clear()
        digests.clear()
    for name in tables.keys() - set(step["running"]):
        del tables[name]
    for name, group, num_kept, num_given_back, added in step["tables"]:
        table = tables.setdefault(name, {}).setdefault(group, [])
        assert num_kept <= len(table)
        table[num_kept:] = added
        table[:num_given_back] = [-1] * num_given_back
    digests.update(zip(*step["digests"], strict=True))


def owners(step: dict[str, Any], tables: dict[str, dict[int, list[int]]], digests: dict[int, str]) -> Counter[int]:
    """How many requests have each block, once the step is applied."""
    apply(step, tables, digests)
    return Counter(
        block for groups in tables.values() for block in {*chain.from_iterable(groups.values())} if block >= 0
    )


def check_format(trace: list[dict[str, Any]]) -> None:
    """The promises that a reader relies on."""
    head, n, known, digests, tables = trace[0], 0, set(), {}, {}
    assert (head["kind"], head["format"]) == ("head", "nano-vllm-trace-2")
    for thing in trace[1:]:
        if thing["kind"] == "request":
            assert thing["request"] not in known and len(thing["prompt"]) <= 200
            known.add(thing["request"])
        elif thing["kind"] == "gap":
            n += thing["steps"]
        else:
            n += 1
            assert thing["n"] == n
            apply(thing, tables, digests)
            blocks = {block for groups in tables.values() for table in groups.values() for block in table} - {-1}
            assert {*blocks, *digests} <= set(range(head["num_blocks"]))
            assert all(len(digest) in (0, 8) for digest in digests.values())
            assert all(group < len(head["windows"]) for groups in tables.values() for group in groups)
            assert thing["stats"]["usage"] == pytest.approx(len(blocks) / head["num_blocks"], abs=1e-4)
            assert {*thing["running"], *thing["waiting"], *thing["tokens"]} <= known
            assert {name for name, *_ in thing["batch"]} <= known
            for event in thing["events"]:
                assert event["what"] in WHAT and event["by"] in head["functions"]
                assert event["text"]["en"] and any("\u4e00" <= char <= "\u9fff" for char in event["text"]["zh"])
