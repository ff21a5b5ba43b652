"""Events are JSON in UTF-8, whatever a request makes an answer repeat."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server.sse import Chunks, event

DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(DATA)
def test_an_event_is_read_as_what_was_said(data: Any) -> None:
    line = event(data)
    assert line.startswith(b"data: ") and line.endswith(b"\n\n") and line.count(b"\n") == 2
    assert json.loads(line.removeprefix(b"data: ")) == data


@pytest.mark.parametrize("text", ["\ud800", "a\udfffé", "\ud83d and \ude00"])
def test_half_a_surrogate_pair_becomes_a_question_mark(text: str) -> None:
    expected = text.encode("utf-8", "replace").decode()
    assert json.loads(event({"x": [text]}).removeprefix(b"data: ")) == {"x": [expected]}
    chunk = Chunks({"id": "1"}).of({"text": text}, {})
    assert json.loads(chunk.removeprefix(b"data: ")) == {"id": "1", "choices": [{"text": expected}]}
