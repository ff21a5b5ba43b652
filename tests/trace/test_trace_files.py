"""What `record` writes is a whole trace: any reader can follow it, and the scenes show in it what they promise."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trace_reading import check_format, events, owners, read, steps

import nanovllm
from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.engine.step_trace import EngineShape, Event, shape_of
from nanovllm.trace import record
from nanovllm.trace.functions import functions
from nanovllm.trace.scenes import SCENES, TEACHING, scene
from nanovllm.trace.words import words
from tools.record_trace import DEMO, record_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    path = tmp_path_factory.mktemp("trace") / "demo.jsonl"
    record_demo(path)
    yield path, read(path)


def test_a_recording_keeps_the_format(demo: tuple[Path, list[dict[str, Any]]]) -> None:
    check_format(demo[1])
    assert len(steps(demo[1])) > 100 and not [thing for thing in demo[1] if thing["kind"] == "gap"]


def test_the_recording_in_the_repository_is_one_of_this_engine(demo: tuple[Path, list[dict[str, Any]]]) -> None:
    """Apart from times, and from texts, which another machine's sums may change."""
    ours, theirs = read(DEMO), demo[1]
    check_format(ours)
    assert DEMO.stat().st_size <= 1 << 20
    assert ours[0]["functions"] == theirs[0]["functions"], "the source has changed: run tools/record_trace.py"
    for mine, other in zip(steps(ours), steps(theirs), strict=True):
        for part in ("n", "batch", "running", "waiting"):
            assert mine[part] == other[part], "the schedule has changed: run tools/record_trace.py"


def test_the_texts_of_a_trace_join_to_what_the_engine_answers(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(demo_model(), device="cpu", dtype="float32", **TEACHING) as llm:
        with record(llm, tmp_path / "t"):
            streamed = [output.outputs[0].text for output in llm.stream("def add(a, b):", params)][-1]
        assert llm.engine.observer is None
        with record(llm, tmp_path / "whole"), pytest.raises(RuntimeError, match="has an observer already"):
            (whole,) = llm.generate("def add(a, b):", params, use_tqdm=False)
            with record(llm, tmp_path / "again"):
                raise AssertionError("two observers")
    for path in ("t", "whole"):
        pieces = [piece for step in steps(read(tmp_path / path)) for piece in step["tokens"].get("A", [])]
        assert "".join(pieces) == streamed == whole.outputs[0].text


class TestScenes:
    @pytest.fixture(scope="class")
    def shows(self, demo: tuple[Path, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        """The steps of each scene: they follow each other, each up to an idle engine."""
        parts: list[list[dict[str, Any]]] = [[]]
        for step in steps(demo[1]):
            parts[-1].append(step)
            if not step["running"] and not step["waiting"]:
                parts.append([])
        assert parts.pop() == []
        return dict(zip(SCENES, parts, strict=True))

    def test_shared_shows_blocks_with_several_owners(self, shows: dict[str, Any]) -> None:
        tables, digests = {}, {}
        assert max(max(owners(step, tables, digests).values(), default=0) for step in shows["shared"]) >= 7
        assert len(events(shows["shared"], "hit")) >= 8 and len(events(shows["shared"], "finish")) == 10

    def test_fill_shows_preemptions_and_all_come_to_their_end(self, shows: dict[str, Any]) -> None:
        assert max(step["stats"]["usage"] for step in shows["fill"]) == 1.0
        assert len(events(shows["fill"], "preempt")) >= 3 and events(shows["fill"], "evict")
        assert len(events(shows["fill"], "finish")) == 8

    def test_long_shows_chunks_beside_decodes(self, shows: dict[str, Any]) -> None:
        chunks = Counter(event["request"] for event in events(shows["long"], "chunk"))
        (name,) = [name for name, number in chunks.items() if number >= 3]
        beside = [step for step in shows["long"] if {"prefill", "decode"} <= {entry[1] for entry in step["batch"]}]
        assert len([step for step in beside if name in {entry[0] for entry in step["batch"]}]) >= 3

    def test_an_engine_that_cannot_show_one_says_why(self) -> None:
        def shape(budget: int) -> EngineShape:
            return EngineShape("cpu", 4096, 256, (None,), 8, budget, 512, 1, 64, 2, 4, 2)

        with pytest.raises(ValueError, match="scene='fill' needs a smaller cache"):
            scene("fill", [1, 2, 3], shape(64))
        with pytest.raises(ValueError, match="max_model_len is 512"):
            scene("long", [1, 2, 3], shape(1024))
        with pytest.raises(ValueError, match="scene='other' must be one of shared, fill, long"):
            scene("other", [1], shape(64))


def test_the_sources_of_functions_are_those_of_the_files() -> None:
    for name, function in functions().items():
        lines = (Path(nanovllm.__file__).parent / function["file"]).read_text().splitlines()
        source = function["source"].splitlines()
        assert source[0].startswith(f"def {name.rpartition('.')[2]}(")
        assert [line.strip() for line in lines[function["line"] - 1 :][: len(source)]] == [s.strip() for s in source]


def test_words_are_refused_for_what_no_tracer_makes() -> None:
    with pytest.raises(KeyError, match="explode"):
        words(Event("explode", "A", "", {}))


def test_the_shape_is_the_engines() -> None:
    with LLM(demo_model(), device="cpu", dtype="float32", **TEACHING) as llm:
        shape = shape_of(llm.engine)
    assert (shape.num_blocks, shape.block_size, shape.max_model_len, shape.hidden_size) == (24, 16, 384, 256)
