"""Refuses strings with half a character, naming the argument that brought them.

A Python string may hold a lone surrogate, one half of a UTF-16 pair: `json.loads` makes one from a cut "\\ud83d", and
`errors="surrogateescape"` makes one from a stray byte. No encoding can write it. A tokenizer would raise an error that
does not name the argument, and a stop string with a surrogate would never be found.
"""


def refuse_surrogates(text: str, name: str) -> None:
    """Raises ValueError, naming the argument, if `text` has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        near = repr(text) if len(text) <= 60 else f"…{text[max(0, start - 20) : start + 20]!r}…"
        raise ValueError(
            f"{name}={near} has a lone surrogate, {text[start]!r} at character {start}, which no encoding can write"
        ) from None
