"""Bad words as the token sequences that spell them, so that the sampler can forbid them. The rule is vLLM's."""

from collections.abc import Iterable
from typing import Any


def bad_word_ids(words: Iterable[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word at the start of a text, and those after a space if they are as many but differ.

    Args:
        words: none blank. Leading spaces are ignored.
        tokenizer: a `transformers` tokenizer.
    """
    found = []
    for word in words:
        word = word.lstrip()
        plain = tuple(tokenizer.encode(word, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word, add_special_tokens=False))
        found.append(plain)
        if plain and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(ids for ids in found if ids)
