"""Words that must not come out, as the token sequences that would spell them. The rule is vLLM's."""

from collections.abc import Iterable
from typing import Any


def bad_word_ids(words: Iterable[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the start of a text, and after a space where that gives as many other tokens.

    Args:
        words: not blank; spaces in front do not matter.
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
