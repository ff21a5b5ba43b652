"""A request becomes a sequence, or is refused: all checks come before anything of the engine changes.

Every error names the argument, its value and what is allowed.
"""

from typing import TYPE_CHECKING

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

BadWords = tuple[tuple[int, ...], ...]  # each bad word as token ids, see `nanovllm.text.bad_words`


def make_sequence(
    engine: "LLMEngine",
    token_ids: list[int],
    params: SamplingParams,
    name: str,
    bad_words: BadWords,
    request_id: str | None,
) -> Sequence:
    """Check a request and make a sequence of it. The engine's books stay as they are.

    Args:
        params: the sequence keeps this object, so the caller must not change it any more.
        name: what an error calls the prompt.
        bad_words: `params.bad_words` as token ids.
        request_id: None: the engine's next number.

    Raises:
        ValueError: the engine cannot run the request.
        RuntimeError: the engine sleeps, or its weights were dropped; EngineDeadError: it has failed for good.
    """
    engine.check_health()
    engine.require_ready()
    check_prompt(token_ids, name, engine.vocab_size, engine.max_model_len)
    check_params(params, bad_words, engine.vocab_size, engine.config.max_logprobs)
    if engine.logits_processors is not None:
        engine.logits_processors.validate(params)
    elif params.extra_args:
        raise ValueError(f"extra_args={params.extra_args!r:.80} must be None: this engine has no logits_processors")
    stop_ids = engine.eos_token_ids.union(params.stop_token_ids)
    check_that_a_token_is_left(params, bad_words, stop_ids, engine.vocab_size)
    num_left = engine.max_model_len - len(token_ids)
    seed = params.seed if params.seed is not None else engine.fresh_seeds.getrandbits(64)
    return Sequence(
        request_id=str(next(engine.fresh_ids)) if request_id is None else request_id,
        token_ids=list(token_ids),
        params=params,
        max_len=len(token_ids) + min(num_left, params.max_tokens or num_left),
        stop_ids=stop_ids,
        stop_reasons=_stop_reasons(params, engine.eos_token_ids, engine.eos_token_id),
        seed=seed & (2**64 - 1),
        bad_words=bad_words,
    )


def check_prompt(token_ids: list[int], name: str, vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError if the prompt is empty or too long, or has an id outside the vocabulary."""
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
    """Raises ValueError if a parameter, valid in itself, exceeds the model's vocabulary or the engine's limits."""
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
    """Raises ValueError if the parameters forbid every first token. `min_tokens` forbids `stop_ids` at first."""
    held_back = (stop_ids if params.min_tokens else frozenset()) | {word[0] for word in bad_words if len(word) == 1}
    if held_back and all(i in held_back for i in params.allowed_token_ids or range(vocab_size)):
        of = "allowed_token_ids" if params.allowed_token_ids else "the vocabulary"
        raise ValueError(f"bad_words and min_tokens, which holds back stop ids, leave none of {of}")


def _stop_reasons(
    params: SamplingParams, eos_token_ids: frozenset[int], eos_token_id: int | None
) -> dict[int, int | None]:
    """The ids that end a sequence, each with its `stop_reason`: the id itself, or None for the tokenizer's EOS."""
    if params.ignore_eos and params.structured_outputs is None:  # a grammar's EOS comes where nothing else can follow
        return {i: i for i in params.stop_token_ids}
    return {i: None if i == eos_token_id else i for i in eos_token_ids.union(params.stop_token_ids)}
