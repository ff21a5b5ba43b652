"""Halves of characters are refused where text comes in, by the name of the argument.

A Python string may hold a lone surrogate, one half of a UTF-16 pair: `json.loads` makes it of a cut "\\ud83d", and
`errors="surrogateescape"` of a stray byte. No encoding has it: a tokenizer fails on it without saying whose it is, and
a stop string with it is never found.
"""


def refuse_surrogates(text: str, name: str) -> None:
    """Raises ValueError, naming the argument, if `text` has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        near = repr(text) if len(text) <= 60 else f"…{text[max(0, start - 20) : start + 20]!r}…"
        raise ValueError(
            f"{name}={near} has a lone surrogate, {text[start]!r} at character {start}, which no text can have"
        ) from None
