"""A bad word does not come out, in whichever of its spellings."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import SHAPES, save_byte_tokenizer, save_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.text.bad_words import bad_word_ids


class WordTokenizer:
    """Knows whole words, those after a space by other ids, and the letters of what it does not know."""

    words = {"cat": [1], " cat": [2], "dog": [3], " dog": [4, 3], " ": [9], "ox": [5], " ox": [5]}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.words[text]


def test_a_word_is_banned_at_the_start_and_after_a_space_where_that_is_another_token() -> None:
    assert bad_word_ids(["cat"], WordTokenizer()) == ((1,), (2,))
    assert bad_word_ids(["  cat", "dog"], WordTokenizer()) == ((1,), (2,), (3,))
    assert bad_word_ids(["ox"], WordTokenizer()) == ((5,),)
    assert bad_word_ids([], WordTokenizer()) == ()


def test_a_bad_word_is_never_in_the_text(
    make_llm: Callable[..., LLM], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path: Path = save_checkpoint(tmp_path_factory.mktemp("text"), {**SHAPES["plain"], "vocab_size": 257})
    save_byte_tokenizer(path)
    llm = make_llm(path, skip_tokenizer_init=False)
    letters = [token for letter in "ab" for token in llm.get_tokenizer().encode(letter)]
    asked = {"allowed_token_ids": letters, "max_tokens": 60, "temperature": 3.0, "seed": 1}
    free, filtered = (
        llm.generate("ab", SamplingParams(**asked, bad_words=words), use_tqdm=False)[0]["text"]
        for words in ([], ["aab", "bbb"])
    )
    assert "aab" in free and "bbb" in free
    assert len(filtered) == 60 and "aab" not in filtered and "bbb" not in filtered and "ab" in filtered
