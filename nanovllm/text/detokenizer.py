"""From token ids to text while they come: only text that no later token can change, and no part of a stop string.

Text is not a sum over tokens: a character may be spread over several, and a token's spaces depend on its neighbour.
So a few tokens are decoded together with the one that is new, and what they add is the new text. Four before it are
enough: a character has at most four bytes, a token at least one, and a broken character's bytes end where the next
one's lead byte comes. What may still change is kept back:

- A "�" at the end, which stands for bytes that have begun a character. One further to the left is final.
- A run of byte tokens (`<0xE4>`). Such tokenizers decode a run as a whole: one byte too many, and "中" is "����".

An output's text goes on where the prompt's ends, and some decoders leave a space out at the beginning of a text. So the
first tokens are decoded behind the last few of the prompt; not if it is one of ids that ends within a character.

The `tokenizers` library's DecodeStream does the first but not the second (it raises an error there), keeps back all
tokens as long as their text ends in "�", decoding them again with each, and never gives what it still has at the end.
"""

import re
from typing import Any, NamedTuple

from nanovllm.sampling_params import SamplingParams

NUM_CONTEXT = 4  # tokens before a new one that its text may depend on
BROKEN = "\ufffd"  # "�", which decoders write for bytes that are no character
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>").fullmatch
_INVISIBLE, _BYTE, _VISIBLE = range(3)


class Context(NamedTuple):
    """The end of a prompt, behind which an output's tokens are decoded."""

    ids: list[int]
    num_chars: int  # of their text


NO_CONTEXT = Context([], 0)


class TokenDecoder:
    """What of a `transformers` tokenizer, fast or slow, makes text of ids. One for all sequences."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            self._special_ids = {i for i, token in added.items() if token.special}
            self.added_tokens = {i: token.content for i, token in added.items()}
        else:
            self._special_ids = set(tokenizer.all_special_ids)
            self.added_tokens = {}  # slow tokenizers put no spaces around them
        self._kinds: dict[int, int] = {}
        self._token_texts: dict[int, str] = {}

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=False)
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def context(self, prompt_ids: list[int], params: SamplingParams) -> Context:
        """What an output's text depends on of its prompt.

        It costs some 3 µs, so that it is not asked first whether this tokenizer's decoder needs it.
        """
        ids: list[int] = []
        for token_id in reversed(prompt_ids):
            kind = self.kind(token_id, params.skip_special_tokens)
            if kind != _INVISIBLE:
                ids.append(token_id)
            if kind == _VISIBLE and len(ids) >= NUM_CONTEXT:  # not within a run of bytes
                break
        ids.reverse()
        text = self.decode(ids) if ids else ""
        return NO_CONTEXT if text.endswith(BROKEN) else Context(ids, len(text))

    def decode_all(self, sequences: list[list[int]], context: Context, params: SamplingParams) -> list[str]:
        """The texts of a request's finished sequences: what a `Detokenizer` would give in the end, but faster."""
        if self.must_join_added_tokens(params):
            streams = [(TextStream(self, params, context), ids) for ids in sequences]
            return ["".join(map(stream.append, ids)) + stream.finish() for stream, ids in streams]
        skip = params.skip_special_tokens
        sequences = [context.ids + ids for ids in sequences]
        if self._backend is not None:
            texts = self._backend.decode_batch(sequences, skip_special_tokens=skip)
        else:
            texts = [self.decode([i for i in ids if self.kind(i, skip)]) for ids in sequences]
        return [text[context.num_chars :] for text in texts]

    def kind(self, token_id: int, skip_special_tokens: bool) -> int:
        """_INVISIBLE (0) if the token adds nothing, _BYTE for a byte token, otherwise _VISIBLE."""
        kind = self._kinds.get(token_id)
        if kind is None:
            token = self._token(token_id)
            kind = _INVISIBLE if not token else _BYTE if _BYTE_TOKEN(token) else _VISIBLE
            self._kinds[token_id] = kind
        return _INVISIBLE if skip_special_tokens and token_id in self._special_ids else kind

    def _token(self, token_id: int) -> str | None:
        if self._backend is not None:
            return self._backend.id_to_token(token_id)
        try:
            return self._tokenizer.convert_ids_to_tokens(token_id)
        except (KeyError, IndexError):  # a model's vocabulary may be larger than its tokenizer's
            return None

    def must_join_added_tokens(self, params: SamplingParams) -> bool:
        """Whether spaces that the tokenizer's decoder puts between added tokens are to be left out."""
        return not (params.skip_special_tokens or params.spaces_between_special_tokens) and bool(self.added_tokens)

    def token_texts(self, token_ids: list[int], before: list[int]) -> list[str]:
        """The texts that tokens add within a text, each by itself behind those before it.

        Of a token that ends within a character it is "", and of the one that completes the character, that character.

        Args:
            before: the tokens before them, of which the last NUM_CONTEXT count.
        """
        known = self._token_texts
        return [known.get(token_id) or self._token_text(token_id, before) for token_id in token_ids]

    def _token_text(self, token_id: int, before: list[int]) -> str:
        """The same of one token; it is remembered unless it depends on those before."""
        if self.kind(token_id, False) == _INVISIBLE:
            return ""
        alone = self.decode([token_id])
        if _is_partial(alone):
            return self._completed_text(token_id, alone, before[-NUM_CONTEXT:])
        # Behind itself, since at the beginning of a text a decoder may leave its space out.
        text = self._token_texts[token_id] = self.decode([token_id] * 2)[len(alone) :]
        return text

    def _completed_text(self, token_id: int, alone: str, before: list[int]) -> str:
        """Of a token that begins or ends within a character: what it adds to the fewest tokens before it that tell."""
        candidates = [] if alone.endswith(BROKEN) else [alone]
        for num in range(1, len(before) + 1):
            context = before[-num:]
            text = self.decode([*context, token_id])
            while context and self.decode(context[-1:]).endswith(BROKEN):  # these have been said to add nothing
                context = context[:-1]
            added = text[len(self.decode(context)) if context else 0 :]
            if not _is_partial(added):
                return added
            if not added.endswith(BROKEN):
                candidates.append(added)
        return candidates[0] if candidates else ""


def _is_partial(text: str) -> bool:
    return text.endswith(BROKEN) or text.startswith(BROKEN)


class TextStream:
    """One sequence's tokens in, its text out: `append` each, then `finish`.

    The pieces join to what the tokens add to the prompt's text, both decoded in one.
    """

    def __init__(self, decoder: TokenDecoder, params: SamplingParams, context: Context = NO_CONTEXT) -> None:
        self._decoder = decoder
        self._skip_special_tokens = params.skip_special_tokens
        self._must_join = decoder.must_join_added_tokens(params)
        self._last_id = context.ids[-1] if context.ids else -1
        self._ids = list(context.ids)  # the window: some context, and the tokens whose text has not been given
        self._num_given = context.num_chars  # of the window's text

    def append(self, token_id: int) -> str:
        """The text that is settled now and was not before."""
        kind = self._decoder.kind(token_id, self._skip_special_tokens)
        if kind == _INVISIBLE:
            return ""
        self._ids.append(token_id)
        if kind == _BYTE:
            return ""
        text = self._decoder.decode(self._ids)
        new = self._take(text)
        if len(self._ids) > 2 * NUM_CONTEXT:
            new += self._move_window(text)
        if self._must_join:
            added = self._decoder.added_tokens
            if self._last_id in added and new == f" {added.get(token_id)}":
                new = new[1:]
            self._last_id = token_id
        return new

    def finish(self) -> str:
        """What was kept back: no token comes any more."""
        text = self._decoder.decode(self._ids) if self._ids else ""
        return text[self._num_given :]

    def _move_window(self, text: str) -> str:
        """Forget all but the context. Returns what was kept back of `text`, if it stands before that: it is final."""
        del self._ids[:-NUM_CONTEXT]
        context = self._decoder.decode(self._ids)
        self._num_given = len(context) - context.endswith(BROKEN)
        return BROKEN if text.endswith(BROKEN) and not context.endswith(BROKEN) else ""

    def _take(self, text: str) -> str:
        end = len(text) - text.endswith(BROKEN)
        new = text[self._num_given : end]
        self._num_given = max(end, self._num_given)
        return new


class Detokenizer:
    """One sequence's text as its tokens come, up to a stop string.

    Which stop string ends the text does not depend on where tokens begin: it is the one that is complete first, and of
    several that end at the same place the first in the list. What may be the beginning of one is kept back.

    Attributes:
        pieces: the text, in pieces. The list only grows.
        num_chars: of them may be shown. It only grows too.
    """

    def __init__(self, decoder: TokenDecoder, params: SamplingParams, context: Context = NO_CONTEXT) -> None:
        self.pieces: list[str] = []
        self.num_chars = 0
        self._stream = TextStream(decoder, params, context)
        self._searches = [StopSearch(stop) for stop in params.stop]
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._num_all = 0  # characters of the pieces
        self._is_closed = False

    @property
    def text(self) -> str:
        """All that may be shown."""
        return "".join(self.pieces)[: self.num_chars]

    def append(self, token_id: int) -> str | None:
        """Take a token. Returns the stop string that it completes, after which nothing may be appended.

        A stop string counts only if some of its text came after the first `min_tokens` tokens.
        """
        self._num_tokens += 1
        return self._add(self._stream.append(token_id))

    def finish(self) -> str | None:
        """No token comes any more: show what was kept back. Returns the stop string that this brings to light."""
        if self._is_closed:
            return None
        stop = self._add(self._stream.finish())
        if stop is None:
            self.num_chars = self._num_all
        self._is_closed = True
        return stop

    def _add(self, new: str) -> str | None:
        if not new:
            return None
        num_before = self._num_all
        self._num_all += len(new)
        self.pieces.append(new)
        if not self._searches:
            self.num_chars = self._num_all
            return None
        counts = self._num_tokens > self._min_tokens
        ends = [(search.read(new, counts), search.stop) for search in self._searches]
        end, stop = min((e for e in ends if e[0]), default=(0, None), key=lambda e: e[0])
        if stop is None:
            num_held = 0 if self._include_stop else max(search.num_matched for search in self._searches)
            self.num_chars = self._num_all - num_held
        else:
            self.num_chars = num_before + end - (0 if self._include_stop else len(stop))
            self._is_closed = True
        return stop


class StopSearch:
    """Looks for one stop string in a text that comes in pieces: the algorithm of Knuth, Morris and Pratt.

    Each character is read once, at a cost that is constant on average, whatever the text and the stop string: when what
    has matched does not go on, what is left of the match is known without looking back. ("Fast pattern matching in
    strings", 1977.)
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # characters at the end of the text that are the stop string's beginning, at the most
        # _borders[n]: of its first n characters, how many at the end are also its beginning. As far as it has matched.
        self._borders = [0, 0]

    def read(self, new: str, counts: bool) -> int:
        """Read on. Returns where in `new` the stop string first ends, if it `counts`, otherwise 0."""
        stop, n = self.stop, self.num_matched
        if n == 0 and stop[0] not in new:
            return 0
        for end, char in enumerate(new, 1):
            n = self._extend(n, char)
            if n == len(stop):
                if counts:
                    return end
                n = self._borders[n]
        self.num_matched = n
        return 0

    def _extend(self, n: int, char: str) -> int:
        """How much matches after one more character, n characters having matched before it."""
        stop, borders = self.stop, self._borders
        while n and stop[n] != char:
            n = borders[n]
        n += stop[n] == char
        if n == len(borders):
            border = borders[n - 1]
            while border and stop[border] != char:
                border = borders[border]
            borders.append(border + (stop[border] == char))
        return n
