"""Token ids to text while the tokens arrive: hands out only text that no later token can change.

`TextStream` decodes each new token behind a few tokens before it (see `text/token_decoder.py`); what that adds to their
text is the new text. It keeps back what may still change:

- A "�" at the end: it stands for bytes that may begin a character. One further to the left is final.
- A run of byte tokens (`<0xE4>`). Decoders turn a run into text as a whole: with one byte too many "中" becomes "����".

`Detokenizer` also ends the text at a stop string, and keeps back what may be the beginning of one.

The `tokenizers` library's DecodeStream handles the first case but raises an error in the second. While a text ends in
"�" it keeps back all tokens and decodes all of them again with each new one, and it never returns what it still holds
at the end.
"""

from nanovllm.sampling_params import SamplingParams
from nanovllm.text.stop_strings import StopSearch
from nanovllm.text.token_decoder import BROKEN, BYTE, INVISIBLE, NO_CONTEXT, NUM_CONTEXT, Context, TokenDecoder


class TextStream:
    """Turns one sequence's tokens into text: `append` each token, then `finish`.

    The returned pieces join to the text that the tokens add behind the prompt, as if both were decoded at once.
    """

    def __init__(self, decoder: TokenDecoder, params: SamplingParams, context: Context = NO_CONTEXT) -> None:
        self._decoder = decoder
        self._skip_special_tokens = params.skip_special_tokens
        self._must_join = decoder.must_join_added_tokens(params)
        self._last_id = context.ids[-1] if context.ids else -1
        self._ids = list(context.ids)  # the window: some context, then the tokens whose text is not all handed out
        self._num_given = context.num_chars  # characters of the window's text handed out

    def append(self, token_id: int) -> str:
        """Take a token. Returns the text that became final with it."""
        kind = self._decoder.kind(token_id, self._skip_special_tokens)
        if kind == INVISIBLE:
            return ""
        self._ids.append(token_id)
        if kind == BYTE:
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
        """Returns the text kept back, after the last token."""
        text = self._decoder.decode(self._ids) if self._ids else ""
        return text[self._num_given :]

    def _move_window(self, text: str) -> str:
        """Shorten the window to its context. Returns what `text` kept back and the context no longer does: final."""
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
    """Makes one sequence's text as its tokens arrive, up to a stop string.

    The stop string that is complete first ends the text; of several that end at the same character, the first in the
    list. So the cut does not depend on where tokens begin.

    Attributes:
        pieces: the text so far, in pieces, some of it still kept back. The list only grows.
        num_chars: how many characters of it the reader may see. It only grows, too.
    """

    def __init__(self, decoder: TokenDecoder, params: SamplingParams, context: Context = NO_CONTEXT) -> None:
        self.pieces: list[str] = []
        self.num_chars = 0
        self._stream = TextStream(decoder, params, context)
        self._searches = [StopSearch(stop) for stop in params.stop]
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._num_all = 0  # characters in `pieces`
        self._is_closed = False

    @property
    def text(self) -> str:
        """All that the reader may see."""
        return "".join(self.pieces)[: self.num_chars]

    def append(self, token_id: int) -> str | None:
        """Take a token. Returns the stop string that it completes, if any; append nothing after that.

        A stop string counts only if at least one of its characters came after the first `min_tokens` tokens.
        """
        self._num_tokens += 1
        return self._add(self._stream.append(token_id))

    def finish(self) -> str | None:
        """After the last token: release the text kept back. Returns the stop string that it completes, if any."""
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


def decode_all(
    decoder: TokenDecoder, sequences: list[list[int]], context: Context, params: SamplingParams
) -> list[str]:
    """The texts of a request's finished sequences: equal to the final text of a `Detokenizer`, but faster."""
    if decoder.must_join_added_tokens(params):
        streams = [(TextStream(decoder, params, context), ids) for ids in sequences]
        return ["".join(map(stream.append, ids)) + stream.finish() for stream, ids in streams]
    texts = decoder.decode_batch([context.ids + ids for ids in sequences], params.skip_special_tokens)
    return [text[context.num_chars :] for text in texts]
