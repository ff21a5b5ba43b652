"""What a request may not ask: what cannot run is refused before the engine is touched, by the name of the argument."""

from nanovllm.sampling_params import SamplingParams

BadWords = tuple[tuple[int, ...], ...]  # as token sequences, see `nanovllm.text.bad_words`


def check_prompt(token_ids: list[int], name: str, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError, naming the prompt as `name`, if it is empty, too long, or has ids of no token."""
    if not token_ids:
        raise ValueError(f"{name} is empty: it must have at least one token")
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} has the token id {token_id}: ids must be in [0, {vocab_size})")
    if len(token_ids) >= max_model_len:
        raise ValueError(
            f"{name} has {len(token_ids)} tokens: with one to generate, they must fit max_model_len={max_model_len}"
        )


def check_params(params: SamplingParams, bad_words: BadWords, vocab_size: int, max_logprobs: int) -> None:
    """Raises ValueError if parameters, each of which is valid, go beyond this model or this engine's limits."""
    by_name = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": [token_id for word in bad_words for token_id in word],
    }
    for name, token_ids in by_name.items():
        if token_ids and max(token_ids) >= vocab_size:
            raise ValueError(f"{name} has {max(token_ids)}: ids must be in [0, {vocab_size})")
    for name in ("logprobs", "prompt_logprobs"):
        num_top = getattr(params, name)
        num_top = vocab_size if num_top == -1 else num_top
        if num_top is not None and 0 <= max_logprobs < num_top:
            raise ValueError(f"{name}={getattr(params, name)} must be at most max_logprobs={max_logprobs}")


def check_that_a_token_is_left(
    params: SamplingParams, bad_words: BadWords, stop_ids: frozenset[int], vocab_size: int
) -> None:
    """Raises ValueError if no first token could be drawn. `stop_ids` are what `min_tokens` holds back."""
    held_back = (stop_ids if params.min_tokens else frozenset()) | {word[0] for word in bad_words if len(word) == 1}
    if held_back and all(i in held_back for i in params.allowed_token_ids or range(vocab_size)):
        of = "allowed_token_ids" if params.allowed_token_ids else "the vocabulary"
        raise ValueError(f"bad_words and min_tokens, which holds back stop ids, leave none of {of}")
