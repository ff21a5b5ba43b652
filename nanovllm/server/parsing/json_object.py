"""Finds the end of a JSON object that arrives in pieces, or the place where it stops to be JSON (RFC 8259)."""

import regex

# Deeper objects are refused: Python's own parser would run out of stack on some of them.
MOST_DEPTH = 128
_SCALAR = r"(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[ \t\n\r,}\]])"
_STRING = r'[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|"'
# What is to come next: the tokens that are allowed there.
_TOKENS = {
    expected: regex.compile(tokens if tokens is _STRING else rf"[ \t\n\r]+|{tokens}")
    for expected, tokens in {
        "object": r"\{",
        "first key": r'"|\}',
        "key": '"',
        "rest of a key": _STRING,
        "colon": ":",
        "value": rf'[{{\[]|"|{_SCALAR}',
        "first value": rf'[{{\[]|\]|"|{_SCALAR}',
        "rest of a string": _STRING,
        "comma": r"[,}\]]",
    }.items()
}


class JsonObject:
    """Where the reading of one object stands."""

    def __init__(self) -> None:
        self.expected = "object"  # a key of _TOKENS, "end" once the object is closed, "error" where it cannot go on
        self.closers = ""  # of the arrays and objects that are open, innermost last

    @property
    def is_open(self) -> bool:
        return self.expected not in ("end", "error")

    def read(self, text: str, start: int) -> int:
        """Read on in `text` from the character `start`. Returns the first one that is not read.

        That is the object's end, an error, or the beginning of a token that more text may complete.
        """
        while self.is_open and start < len(text):
            token = _TOKENS[self.expected].match(text, start, partial=True)
            if token is not None and token.partial:
                break
            after = self._after(token[0]) if token else "error"
            if after != "error":
                start = token.end()
            self.expected = after
        return start

    def _after(self, token: str) -> str:
        """What is expected after a token that was expected."""
        expected = self.expected
        if expected.startswith("rest of"):
            if token != '"':
                return expected
            return "colon" if expected == "rest of a key" else "comma"
        if token.isspace():
            return expected
        if token in "{[":
            self.closers += "}" if token == "{" else "]"
            if len(self.closers) > MOST_DEPTH:
                return "error"
            return "first key" if token == "{" else "first value"
        if token in "}]":
            if token != self.closers[-1]:
                return "error"
            self.closers = self.closers[:-1]
            return "comma" if self.closers else "end"
        if token == ",":
            return "key" if self.closers[-1] == "}" else "value"
        if token == ":":
            return "value"
        if token == '"':
            return "rest of a key" if "key" in expected else "rest of a string"
        return "comma"  # after true, false, null or a number
