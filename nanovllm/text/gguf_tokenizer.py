"""Makes the `transformers` tokenizer of a GGUF file from the vocabulary, merges and special tokens in its metadata.

transformers reads GGUF vocabularies too, but takes 8 s for 49,152 tokens, gives Llama's tokenizers their BOS as EOS,
splits all text as GPT-2 does whatever the model's own way, and reads SentencePiece's scores of Gemma as another
algorithm's. So this follows llama.cpp, and leaves the work to the `tokenizers` library.
"""

from pathlib import Path
from typing import Any

from nanovllm.models.gguf_file import read_gguf

CONTROL, USER_DEFINED = 3, 4  # types of tokens
SPACE = "▁"  # SentencePiece's sign for a space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"  # each digit by itself, and then as GPT-2
# tokenizer.ggml.pre -> how text is cut before merging; "" is GPT-2's way
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), ""),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    "tekken": _TEKKEN,
}
# These take a word that is a token as it is, without merging, and begin a prompt with BOS if the file does not say.
WHOLE_WORDS = (_LLAMA3, _TEKKEN)


def load_gguf_tokenizer(path: Path) -> Any:
    """A tokenizer with the file's chat template. Raises as `read_gguf`, and ValueError for a vocabulary we lack."""
    from transformers import PreTrainedTokenizerFast

    metadata = read_gguf(path).metadata
    tokens = list(_get(metadata, "tokens", ()))
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing")
    model, types = _get(metadata, "model"), _get(metadata, "token_type", [])
    if model == "gpt2":
        tokenizer = _byte_pairs(metadata, tokens)
    elif model == "llama":
        tokenizer = _sentence_pieces(metadata, tokens)
    else:
        raise ValueError(f"tokenizer.ggml.model={model!r:.80} is not supported: gpt2 and llama are")
    _add_tokens(tokenizer, tokens, types, is_sentence_piece=model == "llama")
    special: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _get(metadata, f"{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    _wrap_prompts(tokenizer, metadata, special, model)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(metadata),
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _get(metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", default)


def _byte_pairs(metadata: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = _split_of(metadata)
    merges = [tuple(merge.split(" ", 1)) for merge in _get(metadata, "merges", ())]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split in WHOLE_WORDS))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("", _DIGITS))]
    if split:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_of(metadata: dict[str, Any]) -> str:
    pre = _get(metadata, "pre")
    if pre is None:  # of before April 2024
        return _QWEN2 if str(metadata.get("general.architecture")).startswith("qwen") else ""
    if pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={pre!r:.80} is not supported: {', '.join(SPLITS)} are")
    return SPLITS[pre]


def _sentence_pieces(metadata: dict[str, Any], tokens: list[str]) -> Any:
    """SentencePiece merges the pair whose union has the best score: so scores are ranks of merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = [token.replace(" ", SPACE) for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = _get(metadata, "scores", [])
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    types = _get(metadata, "token_type", [])
    not_merged = {token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)), skip_tokens=not_merged)
    unknown = _get(metadata, "unknown_token_id")
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _get(metadata, "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _add_tokens(tokenizer: Any, tokens: list[str], types: list[int], is_sentence_piece: bool) -> None:
    """Make the tokens that text may hold whole: control tokens, which a decoder leaves out, and the user's."""
    from tokenizers import AddedToken

    added = []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            is_control, text = kind == CONTROL, token.replace(" ", SPACE) if is_sentence_piece else token
            added.append(AddedToken(text, special=is_control, normalized=is_sentence_piece and not is_control))
    tokenizer.add_tokens(added)  # all at once: each call looks at all tokens, and Gemma has thousands


def _wrap_prompts(tokenizer: Any, metadata: dict[str, Any], special: dict[str, str], model: str) -> None:
    from tokenizers import processors

    begins_with_bos = model == "llama" or _split_of(metadata) in WHOLE_WORDS
    bos = special.get("bos_token") if _get(metadata, "add_bos_token", begins_with_bos) else None
    eos = special.get("eos_token") if _get(metadata, "add_eos_token", False) else None
    parts = [part for part in (bos, "$A", eos) if part]
    pair = [part for part in (bos, "$A:0", "$B:0", eos) if part]
    ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} - {None}]
    tokenizer.post_processor = processors.TemplateProcessing(single=parts, pair=pair, special_tokens=ids)


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    template = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    return {"default": template, **named} if named and template else template
