"""Text that comes token by token: in sum the tokenizer's own decode, and on the way nothing that changes later."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from nanovllm import SamplingParams, demo_model
from nanovllm.text.detokenizer import Detokenizer, TextStream, decode_all
from nanovllm.text.stop_strings import StopSearch
from nanovllm.text.token_decoder import NO_CONTEXT, NUM_CONTEXT, TokenDecoder

PLAIN = SamplingParams()
WITH_SPECIAL = SamplingParams(skip_special_tokens=False)
SPECIAL = [AddedToken("<|end|>", special=True), AddedToken("é \ufffd中", special=True)]
CHARACTERS = "aé中😀\ufffd"
# The 256 characters for which byte-level vocabularies write bytes: those below 256 stand for themselves.
BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
_REST = iter(byte for byte in range(256) if chr(byte) not in BYTE_CHARS)
BYTES_OF_CHARS = [ord(char) if ord(char) < 256 else next(_REST) for char in BYTE_CHARS]


def fast(tokenizer: Tokenizer, decoder: Any) -> PreTrainedTokenizerFast:
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def of_vocabulary(tokens: list[str], decoder: Any) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<unk>", *tokens])}
    return fast(Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), decoder)


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, and some tokens that begin or end within a character."""
    alphabet = {byte: char for char, byte in zip(BYTE_CHARS, BYTES_OF_CHARS, strict=True)}
    spell = lambda data: "".join(alphabet[byte] for byte in data)  # noqa: E731
    whole = "x中😀é".encode()
    tokens = [spell([byte]) for byte in range(256)]
    tokens += [spell(whole[i:j]) for i in range(len(whole)) for j in range(i + 2, len(whole) + 1)]
    return of_vocabulary(tokens, decoders.ByteLevel())


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: spaces are in the tokens, and what the vocabulary lacks is spelled in bytes."""
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return of_vocabulary(["▁", "▁a", "b", "▁▁", "中", "\ufffd"] + [f"<0x{byte:02X}>" for byte in range(256)], decoder)


def metaspace() -> PreTrainedTokenizerFast:
    return of_vocabulary(["▁", "▁a", "b", "▁中", "é", "▁▁b", "\ufffd"], decoders.Metaspace())


def word_piece() -> PreTrainedTokenizerFast:
    return of_vocabulary(["a", "##b", ".", ",", "'s", "##", "中", "n't", "\ufffd"], decoders.WordPiece(cleanup=True))


def bpe_suffix() -> PreTrainedTokenizerFast:
    return of_vocabulary(["a</w>", "b", "中</w>", "</w>", "\ufffd"], decoders.BPEDecoder(suffix="</w>"))


def no_decoder() -> PreTrainedTokenizerFast:
    return of_vocabulary(["a", "b", "中", "\ufffd", "xabcd"], None)


SPELLED = {byte: f"{byte:02x}" for byte in range(256)}


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python: bytes, of which characters are made as GPT-2's is known to do it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(eos_token="<|end|>", pad_token="<pad>", **options)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {token: byte for byte, token in SPELLED.items()}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [SPELLED[byte] for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token, 16)

    def _convert_id_to_token(self, index: int) -> str:
        return SPELLED[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        data = b"".join(bytes([int(t, 16)]) if len(t) == 2 else t.encode() for t in tokens)
        return data.decode("utf-8", errors="replace")


class SlowWords(SlowTokenizer):
    """One that puts a space between tokens, as transformers does if nothing else is said."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "demo": lambda: AutoTokenizer.from_pretrained(demo_model()),
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "bpe_suffix": bpe_suffix,
    "no_decoder": no_decoder,
    "slow": SlowTokenizer,
    "slow_words": SlowWords,
}


@cache
def tokenizer_named(name: str) -> tuple[Any, TokenDecoder]:
    tokenizer = TOKENIZERS[name]()
    return tokenizer, TokenDecoder(tokenizer)


def one_shot(tokenizer: Any, ids: list[int], params: SamplingParams = PLAIN) -> str:
    skip = params.skip_special_tokens
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@cache
def token_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids of the vocabulary, often text as the tokenizer itself splits it; for fast ones also ids past the end."""
    tokenizer, _ = tokenizer_named(name)
    past_end = 3 if tokenizer.is_fast else 0
    anything = st.lists(st.integers(0, len(tokenizer) - 1 + past_end), max_size=12)
    text = st.text(st.sampled_from(CHARACTERS) | st.characters(exclude_categories=["Cs"]), max_size=6)
    of_text = text.map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    special = st.sampled_from([i for i in tokenizer.added_tokens_decoder]).map(lambda i: [i])
    run = st.tuples(st.integers(0, len(tokenizer) - 1), st.integers(1, 20)).map(lambda r: [r[0]] * r[1])
    return st.lists(anything | of_text | special | run, max_size=6).map(lambda pieces: sum(pieces, []))


@cache
def prompts(name: str) -> st.SearchStrategy[list[int]]:
    return st.just([]) | token_ids(name)


@pytest.mark.parametrize("params", [PLAIN, WITH_SPECIAL], ids=["skip_special", "keep_special"])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_pieces_of_any_tokens_join_to_what_they_add_to_the_prompt(name: str, params: SamplingParams, data: Any) -> None:
    # Whatever comes later: so no piece holds half a character, or text that a later token would revise.
    tokenizer, decoder = tokenizer_named(name)
    prompt, ids = data.draw(prompts(name)), data.draw(token_ids(name))
    context = decoder.context(prompt, params)
    stream = TextStream(decoder, params, context)
    text = "".join([stream.append(token_id) for token_id in ids]) + stream.finish()
    assert decode_all(decoder, [ids, [], ids], context, params) == [text, "", text]
    before, both = one_shot(tokenizer, prompt, params), one_shot(tokenizer, prompt + ids, params)
    if before.endswith("\ufffd"):  # the prompt ends within a character
        # WordPiece's "##" has no text: where the prompt ends with four, they hide a token that is a whole \ufffd.
        behind = [both.removeprefix(before)] if name == "word_piece" else []
        assert text in [one_shot(tokenizer, ids, params), *behind]
    elif both.startswith(before):
        assert text == both[len(before) :]
    else:
        assert name == "byte_fallback"  # the first bytes have spoiled a run with which the prompt ends


@pytest.mark.parametrize("name", ["demo", "byte_level", "slow"])
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_only_a_character_that_has_begun_is_kept_back(name: str, data: Any) -> None:
    tokenizer, decoder = tokenizer_named(name)
    ids = data.draw(token_ids(name))
    stream, given_text = TextStream(decoder, PLAIN), ""
    for i, token_id in enumerate(ids):
        given_text += stream.append(token_id)
        known = one_shot(tokenizer, ids[: i + 1])
        assert given_text == known[: len(known) - known.endswith("\ufffd")]


def test_byte_tokens_are_kept_back_until_their_run_ends() -> None:
    tokenizer, decoder = tokenizer_named("byte_fallback")
    vocab = tokenizer.get_vocab()
    run = [vocab[f"<0x{byte:02X}>"] for byte in "中".encode()]
    for ids, pieces in (
        ([*run, vocab["b"]], ["", "", "", "中b", ""]),
        ([*run, run[0], vocab["b"]], ["", "", "", "", "\ufffd" * 4 + "b", ""]),  # one byte too many spoils all
        (run, ["", "", "", "中"]),
    ):
        stream = TextStream(decoder, PLAIN)
        assert [stream.append(token_id) for token_id in ids] + [stream.finish()] == pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cost_of_a_token_does_not_grow_with_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoder = tokenizer_named(name)
    decoded = 0

    def count(ids: list[int], decode: Callable[[list[int]], str] = decoder.decode) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(decoder, "decode", count)
    runs = [[i] * 500 for i in range(0, min(len(tokenizer), 300), 7)]
    runs.append(list(range(min(len(tokenizer), 300))) * 2)
    for ids in runs:  # some of them are bytes that never become a character
        decoded = 0
        stream = TextStream(decoder, WITH_SPECIAL)
        text = "".join(map(stream.append, ids)) + stream.finish()
        assert decoded <= 12 * len(ids)
        assert text == one_shot(tokenizer, ids, WITH_SPECIAL)


@pytest.mark.parametrize(("name", "expected"), [("no_decoder", "a<|end|><tool><tool> b"), ("byte_level", None)])
def test_spaces_between_special_tokens_can_be_left_out(name: str, expected: str | None) -> None:
    tokenizer, decoder = tokenizer_named(name)
    vocab = tokenizer.get_vocab()
    ids = [vocab[token] for token in ("a", "<|end|>", "<tool>", "<tool>", "b")]
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    stream = TextStream(decoder, params)
    text = "".join(map(stream.append, ids)) + stream.finish()
    assert decode_all(decoder, [ids], NO_CONTEXT, params) == [text]
    if expected is None:
        assert text == one_shot(tokenizer, ids, params)  # there are none
    else:
        assert one_shot(tokenizer, ids, params) == "a <|end|> <tool> <tool> b"
        assert text == expected.replace("a<", "a <")


@pytest.mark.parametrize("name", ["demo", "byte_fallback", "metaspace", "word_piece"])
@pytest.mark.parametrize(("prompt", "text"), [("a b", " a ab"), ("b.", "中b"), ("a", "b"), ("é", "é a")])
def test_text_is_what_the_librarys_own_stream_gives_behind_the_prompt(name: str, prompt: str, text: str) -> None:
    tokenizer, decoder = tokenizer_named(name)
    prompt_ids, ids = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, text))
    stream = decoders.DecodeStream(ids=prompt_ids, skip_special_tokens=True)
    expected = "".join(stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids)
    assert decode_all(decoder, [ids], decoder.context(prompt_ids, PLAIN), PLAIN) == [expected]


def test_a_decoder_that_leaves_a_space_out_at_the_beginning_keeps_it_behind_a_prompt() -> None:
    tokenizer, decoder = tokenizer_named("byte_fallback")
    vocab = tokenizer.get_vocab()
    a, b, end = vocab["▁a"], vocab["b"], vocab["<|end|>"]
    run = [vocab[f"<0x{byte:02X}>"] for byte in "中".encode()]
    for prompt, params, text in (
        ([b], PLAIN, " ab a"),
        ([], PLAIN, "ab a"),
        ([end], PLAIN, "ab a"),  # it is not in the text, which begins with the output
        ([end], WITH_SPECIAL, " ab a"),
        ([b, *[end] * 9], PLAIN, " ab a"),
        ([b] * 100, PLAIN, " ab a"),
        (run * 3, PLAIN, " ab a"),
        ([vocab["▁"]], PLAIN, " ab a"),
    ):
        context = decoder.context(prompt, params)
        detokenizer = Detokenizer(decoder, params, context)
        for token_id in (a, b, a):
            detokenizer.append(token_id)
        detokenizer.finish()
        assert detokenizer.text == text
        assert decode_all(decoder, [[a, b, a]], context, params) == [text]
        stopping = Detokenizer(
            decoder, SamplingParams(stop=" a", skip_special_tokens=params.skip_special_tokens), context
        )
        assert (stopping.append(a), stopping.text) == ((" a", "") if text[0] == " " else (None, "a"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_of_one_token_is_what_it_adds_within_a_text(name: str) -> None:
    tokenizer, decoder = tokenizer_named(name)
    for token_id in range(0, len(tokenizer), 5):
        alone = one_shot(tokenizer, [token_id], WITH_SPECIAL)
        text = one_shot(tokenizer, [token_id] * 2, WITH_SPECIAL)[len(alone) :]
        if "\ufffd" in alone:  # nothing before it completes the character that it ends
            text = "" if alone.endswith("\ufffd") else alone
        for _ in range(2):
            assert decoder.token_texts([token_id], []) == [text]
    assert decoder.token_texts([len(tokenizer) + 5], []) == [""]  # models have more ids than their tokenizers


def texts_of_tokens(decoder: TokenDecoder, ids: list[int]) -> list[str]:
    return [decoder.token_texts([token_id], ids[max(0, i - NUM_CONTEXT) : i])[0] for i, token_id in enumerate(ids)]


def test_text_of_a_token_has_its_space_and_a_character_comes_with_its_last_byte() -> None:
    _, decoder = tokenizer_named("byte_level")
    ids = byte_level_tokens()
    split = [ids[data] for data in (b"x\xe4", b"\xb8", b"\xad\xf0", b"\x9f\x98", b"\x80", b"x")]
    assert texts_of_tokens(decoder, split) == ["", "", "", "", "x中😀", "x"]
    likeliest = [ids[data] for data in (b"\xad", b"\xb8", b"x", b"\xe4")]  # each is completed by itself
    assert decoder.token_texts(likeliest, [ids[b"\xe4"], ids[b"\xb8"]]) == ["中", "丸", "x", ""]
    tokenizer, decoder = tokenizer_named("byte_fallback")
    vocab = tokenizer.get_vocab()
    run = [vocab[f"<0x{byte:02X}>"] for byte in "中é".encode()]
    assert texts_of_tokens(decoder, [vocab["▁a"], *run, vocab["▁a"], vocab["b"], vocab["▁"]]) == [
        " a", "", "", "中", "", "é", " a", "b", " ",
    ]  # fmt: skip


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_texts_of_tokens_join_to_the_text(data: Any) -> None:
    tokenizer, decoder = tokenizer_named("byte_level")
    text = data.draw(st.text("ab中😀é", max_size=8))
    ids = sum((random_split(tokenizer, char.encode(), data) for char in text), [])
    texts = texts_of_tokens(decoder, ids)
    assert not any("\ufffd" in t for t in texts)
    assert "".join(texts) == text


def expected_cut(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Character by character: where the first stop string to be complete begins, of several the first of the list."""
    for end in range(1, len(text) + 1):
        for s in stop:
            if text[:end].endswith(s):
                return end - len(s), s
    return None


def kept_back(text: str, stop: list[str]) -> int:
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


@given(data=st.data(), include=st.booleans())
@settings(deadline=None, max_examples=600)
def test_stop_strings_are_found_wherever_tokens_begin_and_never_shown(data: Any, include: bool) -> None:
    tokenizer, decoder = tokenizer_named("byte_level")
    text = data.draw(st.text("ab中", max_size=14))
    stop = data.draw(st.lists(st.text("ab中", min_size=1, max_size=5), min_size=1, max_size=3))
    ids = random_split(tokenizer, text.encode(), data)
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    detokenizer = Detokenizer(decoder, params)
    found = expected_cut(text, stop)
    final = text if found is None else text[: found[0] + (len(found[1]) if include else 0)]
    answer, shown = None, [""]
    for i, token_id in enumerate(ids):
        answer = detokenizer.append(token_id)
        shown.append(detokenizer.text)
        known = one_shot(tokenizer, ids[: i + 1]).removesuffix("\ufffd")
        if answer is not None:
            break
        assert detokenizer.text == (known if include else known[: len(known) - kept_back(known, stop)])
    assert (detokenizer.finish(), detokenizer.text) == (None, final)
    assert answer == (found and found[1])
    assert all(final.startswith(part) for part in shown)
    assert all(later.startswith(part) for part, later in zip(shown, shown[1:], strict=False)), (
        "shown text was taken back"
    )


def random_split(tokenizer: Any, data: bytes, draw_from: Any) -> list[int]:
    """Tokens that spell `data`, with borders anywhere, also inside characters: the byte-level vocabulary has both."""
    by_bytes = byte_level_tokens()
    ids = []
    while data:
        choices = [n for n in range(1, min(len(data), 12) + 1) if data[:n] in by_bytes]
        n = draw_from.draw(st.sampled_from(choices))
        ids.append(by_bytes[data[:n]])
        data = data[n:]
    assert tokenizer is tokenizer_named("byte_level")[0]
    return ids


@cache
def byte_level_tokens() -> dict[bytes, int]:
    tokenizer, _ = tokenizer_named("byte_level")
    to_byte = dict(zip(BYTE_CHARS, BYTES_OF_CHARS, strict=True))
    vocab = tokenizer.get_vocab()
    return {bytes(to_byte[c] for c in t): i for t, i in vocab.items() if all(c in to_byte for c in t) and i <= 300}


def test_stop_string_in_what_was_kept_back_is_found_at_the_end() -> None:
    _, decoder = tokenizer_named("byte_level")
    ids = byte_level_tokens()
    half = [ids[bytes([byte])] for byte in "x中".encode()[:-1]]
    detokenizer = Detokenizer(decoder, SamplingParams(stop="\ufffd"))
    assert [detokenizer.append(token_id) for token_id in half] == [None] * 3
    assert detokenizer.text == "x"
    assert (detokenizer.finish(), detokenizer.text) == ("\ufffd", "x")


@pytest.mark.parametrize(
    ("min_tokens", "stop", "text", "expected"),
    [
        (0, ["aa"], "aaaa", ("", 2)),
        (1, ["aa"], "aaaa", ("", 2)),
        (2, ["aa"], "aaaa", ("a", 3)),  # a stop string may begin before, but must end after them
        (3, ["aa"], "aaaa", ("aa", 4)),
        (4, ["aa"], "aaaa", ("aaaa", None)),
        (3, ["ab"], "abbab", ("abb", 5)),
    ],
)
def test_stop_strings_count_after_min_tokens(
    min_tokens: int, stop: list[str], text: str, expected: tuple[str, int | None]
) -> None:
    _, decoder = tokenizer_named("byte_level")
    detokenizer = Detokenizer(decoder, SamplingParams(stop=stop, min_tokens=min_tokens))
    answers = []
    for i, byte in enumerate(text.encode()):
        answers.append(detokenizer.append(byte_level_tokens()[bytes([byte])]))
        if answers[-1] is not None:
            assert i + 1 == expected[1]
            break
    detokenizer.finish()
    assert (detokenizer.text, any(answers)) == (expected[0], expected[1] is not None)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("stop", "found", "start"),
    [
        (["b", "ab"], "b", 2),  # both are complete at the same place: the first of the list, as in vLLM
        (["ab", "b"], "ab", 1),
        (["cd", "b"], "b", 2),  # the one that is complete first, whatever the list
        (["b", "b"], "b", 2),
    ],
)
def test_of_several_stop_strings_the_first_to_be_complete_ends_the_text(
    stop: list[str], found: str, start: int, include: bool
) -> None:
    tokenizer, decoder = tokenizer_named("no_decoder")
    token_id = tokenizer.convert_tokens_to_ids("xabcd")
    detokenizer = Detokenizer(decoder, SamplingParams(stop=stop, include_stop_str_in_output=include))
    assert detokenizer.append(token_id) == found
    assert detokenizer.text == "xabcd"[: start + (len(found) if include else 0)]


@given(
    stop=st.text("ab", min_size=1, max_size=12),
    pieces=st.lists(st.tuples(st.text("ab", min_size=1, max_size=20), st.booleans()), max_size=8),
)
@settings(deadline=None, max_examples=1000)
def test_search_knows_after_each_piece_how_much_of_the_stop_string_has_matched(
    stop: str, pieces: list[tuple[str, bool]]
) -> None:
    search, text = StopSearch(stop), ""
    for new, counts in pieces:
        start = max(0, len(text) - len(stop) + 1)
        text += new
        found = text.find(stop, start)
        expected = found + len(stop) - (len(text) - len(new)) if counts and found >= 0 else 0
        assert search.read(new, counts) == expected
        if expected:
            return
        assert search.num_matched == kept_back(text, [stop])


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("a" * 5000 + "b", "a" * 20000),
        ("ab" * 3000 + "c", "ab" * 10000),
        ("a" * 100_000 + "b", ("a" * 999 + "b") * 20),
        ("b" + "a" * 5000, "ba" * 10000),
    ],
    ids=["run", "pair", "broken runs", "never"],
)
def test_cost_of_the_search_grows_with_the_text_alone(stop: str, text: str) -> None:
    num_looked_at = 0

    class Counted(str):
        def __getitem__(self, index: int) -> str:
            nonlocal num_looked_at
            num_looked_at += 1
            return str.__getitem__(self, index)

        def startswith(self, *args: Any) -> bool:  # a place of the text that is tried
            nonlocal num_looked_at
            num_looked_at += 1
            return str.startswith(self, *args)

    search = StopSearch(Counted(stop))
    for start in range(0, len(text), 4):
        assert search.read(text[start : start + 4], counts=True) == 0
    assert search.num_matched == kept_back(text, [stop])
    assert num_looked_at <= 8 * len(text)
