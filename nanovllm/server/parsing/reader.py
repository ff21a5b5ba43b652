"""Reads text that arrives in deltas: a parser is a generator that yields whenever it needs more of the text.

So a parser reads as if the whole text lay before it. It looks for regular expressions, and the `regex` library tells a
text that does not match from one that may match once more has arrived: the reader holds back the latter alone. What
comes out does not depend on where the deltas end, if no pattern here can match more than it first matched.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

from regex import Match, Pattern

from nanovllm.server.parsing.pieces import Piece, append

T = TypeVar("T")
Steps = Generator[None, None, T]


class Reader:
    """The text that has arrived and is not yet taken, and the pieces that a parser has made of it."""

    def __init__(self, parser: Callable[["Reader"], Steps[None]]) -> None:
        """`parser` takes all of the text, and returns only once the text has ended."""
        self.text = ""
        self.ended = False
        self._pieces: list[Piece] = []
        self._steps = parser(self)

    def feed(self, delta: str) -> list[Piece]:
        """The pieces that are certain once this text has arrived. Raises ValueError after `finish`."""
        if self.ended:
            raise ValueError(f"delta={delta!r:.80} comes after the text has ended")
        self.text += delta
        return self._advance()

    def finish(self) -> list[Piece]:
        """The last pieces: no more text comes."""
        self.ended = True
        return self._advance()

    def _advance(self) -> list[Piece]:
        next(self._steps, None)
        pieces, self._pieces = self._pieces, []
        return pieces

    def give(self, piece: Piece) -> None:
        append(self._pieces, piece)

    def take(self, num_characters: int) -> str:
        """Remove the text's beginning, and return it."""
        taken, self.text = self.text[:num_characters], self.text[num_characters:]
        return taken

    def find(self, pattern: Pattern[str], give: Callable[[str], None]) -> Steps[Match[str] | None]:
        """Gives the text in front of the first match. Returns the match, at the text's beginning; None at the end."""
        while True:
            found = pattern.search(self.text, partial=True)
            give(self.take(found.start() if found else len(self.text)))
            if found and not found.partial:
                return pattern.match(self.text)
            if self.ended:
                give(self.take(len(self.text)))
                return None
            yield

    def match(self, pattern: Pattern[str], start: int = 0) -> Steps[Match[str] | None]:
        """The match that begins at the character `start`, or None once it is clear that there is none."""
        while True:
            match = pattern.match(self.text, start, partial=True)
            if match is None or not match.partial:
                return match
            if self.ended:
                return None
            yield

    def rest(self, give: Callable[[str], None]) -> Steps[None]:
        """Gives all text from here on."""
        while True:
            give(self.take(len(self.text)))
            if self.ended:
                return
            yield

    def skip_newlines(self) -> Steps[None]:
        """Drops newlines in front of the text."""
        while True:
            self.text = self.text.lstrip("\n")
            if self.text or self.ended:
                return
            yield
