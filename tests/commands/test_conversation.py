"""A conversation's prompt is what the template makes of it, and leaves out the oldest turns before it is too long."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanovllm import demo_model
from nanovllm.commands.conversation import Conversation, Turn, most_prompt_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [Turn("a", "b"), Turn("c", "d")]


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def chatty() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_template_writes_system_prompt_turns_and_question(chatty: Any) -> None:
    prompt = Conversation("s", list(TURNS)).prompt(chatty, "e")
    text = "<system>s\n<user>a\n<assistant>b\n<user>c\n<assistant>d\n<user>e\n<assistant>"
    assert prompt["prompt"] == text and chatty.decode(prompt["prompt_token_ids"]) == text


def test_without_a_template_the_text_goes_on(plain: Any) -> None:
    prompt = Conversation("s", list(TURNS)).prompt(plain, "e")
    assert prompt["prompt"] == "s\na\nb\nc\nd\ne\n" == plain.decode(prompt["prompt_token_ids"])


@given(
    turns=st.lists(st.builds(Turn, st.text("ab ", max_size=30), st.text("ab ", max_size=30)), max_size=6),
    most=st.integers(1, 120),
)
@settings(max_examples=60, deadline=None)
def test_the_fewest_oldest_turns_are_left_out(turns: list[Turn], most: int, chatty: Any) -> None:
    def length(kept: list[Turn]) -> int:
        return len(Conversation("s", kept).prompt(chatty, "question")["prompt_token_ids"])

    conversation = Conversation("s", list(turns))
    prompt, num_dropped = conversation.fitting_prompt(chatty, "question", most)
    assert conversation.turns == turns
    assert len(prompt["prompt_token_ids"]) == length(turns[num_dropped:])
    assert length(turns[num_dropped:]) <= most or num_dropped == len(turns)
    assert num_dropped == 0 or length(turns[num_dropped - 1 :]) > most


@given(st.integers(1, 10_000), st.none() | st.integers(1, 10_000))
def test_an_answer_has_room_and_a_prompt_most_of_it(max_model_len: int, max_tokens: int | None) -> None:
    room = max_model_len - most_prompt_tokens(max_model_len, max_tokens)
    assert 1 <= room <= max(1, max_model_len // 4)
    assert max_tokens is None or room <= max_tokens
