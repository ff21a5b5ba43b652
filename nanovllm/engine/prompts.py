"""The arguments of `generate` in their many forms become one: lists of prompts, parameters and ids, all checked.

Every error names the argument, shows its value and says what is allowed.
"""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from nanovllm.sampling_params import SamplingParams
from nanovllm.text.surrogates import refuse_surrogates

Prompt = str | list[int] | dict[str, Any]

# vLLM's prompts may have these keys, too. Ours may if their values are empty.
ABSENT_PROMPT_KEYS = frozenset(
    ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "cache_salt", "token_type_ids", "prompt_embeds")
)


def as_list_of_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. Raises TypeError."""
    is_list = isinstance(prompts, (list, tuple))
    if isinstance(prompts, (str, dict)) or (is_list and prompts and _is_id_type(type(prompts[0]))):
        return [prompts]
    if not is_list:
        raise TypeError(f"prompts={_shorten(prompts)} must be a string, a list of token ids, or a list of these")
    return list(prompts)


def text_and_ids(prompt: Prompt, name: str) -> tuple[str | None, list[int] | None]:
    """A prompt's text and a fresh list of its token ids; one of the two may be None.

    Raises TypeError or ValueError, which call the prompt `name`.
    """
    text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    if isinstance(prompt, dict):
        unknown = prompt.keys() - {"prompt", "prompt_token_ids"} - ABSENT_PROMPT_KEYS
        if unknown or not prompt:
            keys = ", ".join(map(repr, prompt))
            raise ValueError(f"{name} has the keys {keys or 'none'}: it must have 'prompt' or 'prompt_token_ids'")
        for key in prompt.keys() & ABSENT_PROMPT_KEYS:
            if not isinstance(prompt[key], dict | None) or prompt[key]:
                raise ValueError(f"{name}[{key!r}]={_shorten(prompt[key])} must be None: it is not supported")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if not isinstance(text, str | None):
            raise TypeError(f"{name}['prompt']={_shorten(text)} must be a string")
    if text is not None:
        refuse_surrogates(text, name if text is prompt else f"{name}['prompt']")
        if token_ids is None:
            return text, None
    kinds = set(map(type, token_ids)) if isinstance(token_ids, (list, tuple)) else {None}
    if not all(map(_is_id_type, kinds)):
        raise TypeError(f"{name}={_shorten(prompt)} must be a string or a list of token ids")
    return text, list(token_ids) if kinds <= {int} else list(map(int, token_ids))


def truncated(token_ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The prompt's last `truncate_prompt_tokens` ids; with -1 as many as leave room for one token."""
    num_kept = params.truncate_prompt_tokens
    return token_ids if num_kept is None else token_ids[-(max_model_len - 1 if num_kept == -1 else num_kept) :]


def copy_params(params: Any, name: str = "sampling_params") -> SamplingParams:
    """A checked copy, which stays as it is when the caller later assigns to `params`.

    Raises TypeError, which calls the argument `name`, or ValueError.
    """
    if not isinstance(params, SamplingParams):
        raise TypeError(f"{name}={_shorten(params)} must be a SamplingParams")
    return params.clone()


def params_for_each(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """A list with the parameters of each prompt, still the caller's own objects. Raises TypeError, ValueError."""
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, (list, tuple)) or not all(
        isinstance(p, SamplingParams) for p in sampling_params
    ):
        raise TypeError(f"sampling_params={_shorten(sampling_params)} must be a SamplingParams or a list of them")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts: give one, or one for each"
        )
    return list(sampling_params)


def check_strings(params: SamplingParams, request_id: str | None) -> None:
    """Raises ValueError if one of a request's strings has a lone surrogate."""
    for name in ("stop", "bad_words"):
        for i, string in enumerate(getattr(params, name)):
            refuse_surrogates(string, f"{name}[{i}]")
    if request_id is not None:
        refuse_surrogates(request_id, "request_id")


def as_request_ids(request_id: str | Iterable[str]) -> list[str]:
    """One request id or several, as a list. Raises TypeError."""
    ids = [request_id] if isinstance(request_id, str) else request_id
    ids = list(ids) if isinstance(ids, Iterable) else [ids]
    if not all(isinstance(i, str) for i in ids):
        raise TypeError(f"request_id={_shorten(request_id)} must be a string or a list of strings")
    return ids


def copy_containers(value: Any) -> Any:
    """A deep copy of dicts and lists, which the caller may change before they are read; other objects stay."""
    if isinstance(value, dict):
        return {key: copy_containers(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    return list(value) if value and _is_id_type(type(value[0])) else [copy_containers(item) for item in value]


def _is_id_type(kind: type | None) -> bool:
    """Whether values of this type may be token ids: integers of Python and numpy, but not bool."""
    return kind is not None and issubclass(kind, Integral) and not issubclass(kind, bool)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
