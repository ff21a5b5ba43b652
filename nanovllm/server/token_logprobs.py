"""Log-probabilities in the form that chat completions and responses share."""

from typing import Any

from nanovllm.outputs import CompletionOutput, Logprob
from nanovllm.server.completions import finite


def token_logprobs(completion: CompletionOutput, num_top: int, as_ids: bool = False) -> list[dict[str, Any]]:
    """An entry for each token, with the `num_top` likeliest at its place. `as_ids`: tokens are told as token_id:7."""
    told = []
    for of_token in completion.logprobs or []:
        entries = [_entry(i, value, as_ids) for i, value in of_token.items()]
        ranked = zip(of_token.values(), entries, strict=True)
        likeliest = [entry for value, entry in ranked if (value.rank or 0) <= num_top]
        told.append(entries[0] | {"top_logprobs": likeliest})
    return told


def _entry(token_id: int, value: Logprob, as_ids: bool) -> dict[str, Any]:
    text = value.decoded_token
    if as_ids or text is None:
        text = f"token_id:{token_id}"
    return {"token": text, "logprob": finite(value.logprob), "bytes": list(text.encode("utf-8", "replace"))}
