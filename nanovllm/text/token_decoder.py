"""What token ids mean as text: one decoder for all sequences, over any `transformers` tokenizer.

Text is not a sum over tokens: several tokens may share a character, and a token's spaces depend on its neighbours. So
a token is decoded together with the four tokens before it. Four are enough: a character has at most four bytes, a token
has at least one, and a broken character's bytes end where the next character's lead byte comes.

An output's text continues the prompt's text, and some decoders drop a space at the beginning of a text. So an output's
first tokens are decoded behind the prompt's last tokens (its `Context`), unless the prompt ends within a character.
"""

import re
from typing import Any, NamedTuple

from nanovllm.sampling_params import SamplingParams

NUM_CONTEXT = 4  # a token's text depends on at most this many tokens before it
BROKEN = "\ufffd"  # decoders write it for bytes that form no character
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>").fullmatch
INVISIBLE, BYTE, VISIBLE = range(3)  # kinds of tokens: no text, one byte of a run, text


class Context(NamedTuple):
    """A prompt's last tokens, behind which an output's first tokens are decoded."""

    ids: list[int]
    num_chars: int  # of their text


NO_CONTEXT = Context([], 0)


class TokenDecoder:
    """The decoding half of a `transformers` tokenizer, fast or slow. All sequences share one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # None: a slow tokenizer
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
        """The prompt's last tokens, on which the text of its output depends.

        It costs some 3 µs, so it is made for every tokenizer, whether its decoder needs it or not.
        """
        ids: list[int] = []
        for token_id in reversed(prompt_ids):
            kind = self.kind(token_id, params.skip_special_tokens)
            if kind != INVISIBLE:
                ids.append(token_id)
            if kind == VISIBLE and len(ids) >= NUM_CONTEXT:  # cutting a run of byte tokens would change its text
                break
        ids.reverse()
        text = self.decode(ids) if ids else ""
        return NO_CONTEXT if text.endswith(BROKEN) else Context(ids, len(text))

    def decode_batch(self, sequences: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """The texts of several sequences."""
        if self._backend is not None:
            return self._backend.decode_batch(sequences, skip_special_tokens=skip_special_tokens)
        return [self.decode([i for i in ids if self.kind(i, skip_special_tokens)]) for ids in sequences]

    def kind(self, token_id: int, skip_special_tokens: bool) -> int:
        """INVISIBLE (0) for a token that adds no text, BYTE for a byte token, otherwise VISIBLE."""
        kind = self._kinds.get(token_id)
        if kind is None:
            token = self._token(token_id)
            kind = INVISIBLE if not token else BYTE if _BYTE_TOKEN(token) else VISIBLE
            self._kinds[token_id] = kind
        return INVISIBLE if skip_special_tokens and token_id in self._special_ids else kind

    def _token(self, token_id: int) -> str | None:
        if self._backend is not None:
            return self._backend.id_to_token(token_id)
        try:
            return self._tokenizer.convert_ids_to_tokens(token_id)
        except (KeyError, IndexError):  # a model's vocabulary may be larger than its tokenizer's
            return None

    def must_join_added_tokens(self, params: SamplingParams) -> bool:
        """Whether to remove the spaces that the tokenizer's decoder puts between added tokens."""
        return not (params.skip_special_tokens or params.spaces_between_special_tokens) and bool(self.added_tokens)

    def token_texts(self, token_ids: list[int], before: list[int]) -> list[str]:
        """The text that each of these tokens would add behind the tokens `before`.

        A token that ends within a character adds ""; the token that completes the character adds all of it.

        Args:
            before: the tokens of the sequence so far; only the last NUM_CONTEXT matter.
        """
        known = self._token_texts
        return [known.get(token_id) or self._token_text(token_id, before) for token_id in token_ids]

    def _token_text(self, token_id: int, before: list[int]) -> str:
        """One token's text, remembered unless it depends on the tokens before."""
        if self.kind(token_id, False) == INVISIBLE:
            return ""
        alone = self.decode([token_id])
        if _is_partial(alone):
            return self._completed_text(token_id, alone, before[-NUM_CONTEXT:])
        # Decoded behind itself, since at the beginning of a text a decoder may drop the token's space.
        text = self._token_texts[token_id] = self.decode([token_id] * 2)[len(alone) :]
        return text

    def _completed_text(self, token_id: int, alone: str, before: list[int]) -> str:
        """The text of a token that begins or ends within a character: decoded behind as few tokens as settle it."""
        candidates = [] if alone.endswith(BROKEN) else [alone]
        for num in range(1, len(before) + 1):
            context = before[-num:]
            text = self.decode([*context, token_id])
            while context and self.decode(context[-1:]).endswith(BROKEN):  # such a token has added no text itself
                context = context[:-1]
            added = text[len(self.decode(context)) if context else 0 :]
            if not _is_partial(added):
                return added
            if not added.endswith(BROKEN):
                candidates.append(added)
        return candidates[0] if candidates else ""


def _is_partial(text: str) -> bool:
    return text.endswith(BROKEN) or text.startswith(BROKEN)
