"""Reads traces as a page does, and says what any reader may rely on."""

import json
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


def check_format(trace: list[dict[str, Any]]) -> None:
    """The promises that a reader relies on."""
    head, n, known, blocks = trace[0], 0, set(), {}
    assert (head["kind"], head["format"]) == ("head", "nano-vllm-trace-1")
    for thing in trace[1:]:
        if thing["kind"] == "request":
            assert thing["request"] not in known and len(thing["prompt"]) <= 200
            known.add(thing["request"])
        elif thing["kind"] == "gap":
            n += thing["steps"]
        else:
            n += 1
            assert thing["n"] == n
            if thing.get("full"):
                blocks.clear()
            for block, state, owners, first_token, digest in thing["blocks"]:
                assert 0 <= block < head["num_blocks"] and state in ("used", "cached", "free")
                assert bool(owners) == (state == "used")
                assert first_token == -1 or first_token % head["block_size"] == 0
                assert len(digest) in (0, 8)
                blocks[block] = state
            share = sum(state == "used" for state in blocks.values()) / head["num_blocks"]
            assert thing["stats"]["usage"] == pytest.approx(share, abs=1e-4)
            assert {*thing["running"], *thing["waiting"], *thing["tokens"]} <= known
            assert {name for name, *_ in thing["batch"]} <= known
            for event in thing["events"]:
                assert event["what"] in WHAT and event["by"] in head["functions"]
                assert event["text"]["en"] and any("\u4e00" <= char <= "\u9fff" for char in event["text"]["zh"])
