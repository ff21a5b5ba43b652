"""A line of a file of prompts becomes a request, and what the engine makes of it a line of results.

A line has "prompt" (text or token ids) or "messages" (a conversation). Its keys that are named like a parameter of
`SamplingParams` replace those of the command line, for this line; the others are kept in the results, under "input".
A line in the format of OpenAI's batches has these keys in its "body" instead, which may have no others but
OpenAI's that change no answer ("model", "user", …).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from nanovllm.engine.prompts import Prompt
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import chat_prompt

URLS = ("/v1/chat/completions", "/v1/completions")
OF_CHAT = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
OF_SAMPLING = {f.name for f in fields(SamplingParams)} - {"output_kind"}
# Keys of OpenAI's bodies that change no answer.
WITHOUT_EFFECT = ("metadata", "model", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")


@dataclass(slots=True)
class Asked:
    """What a line asks for."""

    prompt: Any = None  # None: the messages are the prompt
    messages: Any = None
    chat_options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)  # parameters of the line's own
    kept: dict[str, Any] = field(default_factory=dict)  # the keys that mean nothing here
    custom_id: Any = None

    def as_prompt(self, tokenizer: Any) -> Prompt:
        """The prompt for the engine. Raises as `chat_prompt`."""
        if self.messages is None:
            return self.prompt
        return chat_prompt(tokenizer, self.messages, **{"add_generation_prompt": True, **self.chat_options})


def asked_in_text(line: bytes) -> Asked:
    """A line of plain text is a prompt. Raises ValueError if it is not UTF-8."""
    return Asked(prompt=line.rstrip(b"\r\n").decode())


def asked_in_json(line: bytes) -> Asked:
    """Read a line of JSON.

    Raises:
        TypeError, ValueError: the line is no JSON object in one of the forms above.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TypeError(f"the line is {content!r:.80}: it must be a JSON object with 'prompt' or 'messages'")
    custom_id = content.pop("custom_id", None)
    is_batch = "body" in content
    body = content.pop("body") if is_batch else content
    if not isinstance(body, dict):
        raise TypeError(f"body={body!r:.80} must be a JSON object")
    if is_batch and content.get("url", URLS[0]) not in URLS:
        raise ValueError(f"url={content['url']!r:.80} must be one of {', '.join(URLS)}")
    asked = Asked(kept=dict(content) if is_batch else {}, custom_id=custom_id)
    for key, value in body.items():
        if key in ("prompt", "messages"):
            setattr(asked, key, value)
        elif key in OF_CHAT:
            asked.chat_options[key] = value
        elif key in OF_SAMPLING:
            asked.sampling[key] = value
        elif is_batch:
            _take_openai_key(key, value, asked.sampling)
        else:
            asked.kept[key] = value
    if (asked.prompt is None) == (asked.messages is None):
        raise ValueError("the line must have either 'prompt' or 'messages'")
    if asked.prompt is not None and asked.chat_options:
        raise ValueError(f"{min(asked.chat_options)!r} is for 'messages', and the line has a 'prompt'")
    return asked


def _take_openai_key(key: str, value: Any, sampling: dict[str, Any]) -> None:
    if key == "max_completion_tokens":
        sampling.setdefault("max_tokens", value)
    elif key == "stream" and value:
        raise ValueError("stream=True must be False: a file gets whole answers")
    elif key not in ("stream", *WITHOUT_EFFECT):
        sampling[key] = value  # SamplingParams takes vLLM's words that ask for nothing, and refuses the others


def error_record(custom_id: Any, error: str) -> dict[str, Any]:
    """The results of a line that cannot run."""
    return {**_id_part(custom_id), "error": error}


def result_record(asked: Asked, output: RequestOutput, has_text: bool = True) -> dict[str, Any]:
    """The results of a line: its completions, as OpenAI's choices; what they took; and the keys that were kept.

    Without text, with detokenize=False, the choices have token ids.

    A line whose request failed, for logits that are NaN for one, has "error" instead.
    """
    failed = next((c for c in output.outputs if c.finish_reason == "error"), None)
    if failed is not None:
        return error_record(asked.custom_id, str(failed.stop_reason))
    num_prompt, num_new = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    record = {
        **_id_part(asked.custom_id),
        "choices": [_choice(asked, completion, has_text) for completion in output.outputs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        },
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(_logprobs(output.prompt_logprobs))
    return record | ({"input": asked.kept} if asked.kept else {})


def _id_part(custom_id: Any) -> dict[str, Any]:
    return {} if custom_id is None else {"custom_id": custom_id}


def _choice(asked: Asked, completion: CompletionOutput, has_text: bool) -> dict[str, Any]:
    is_chat = asked.messages is not None
    choice: dict[str, Any] = {"index": completion.index}
    choice |= {"message": {"role": "assistant", "content": completion.text}} if is_chat else {"text": completion.text}
    choice |= {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
    if not has_text:
        choice["token_ids"] = completion.token_ids
    if completion.logprobs is not None:
        choice["logprobs"] = list(_logprobs(completion.logprobs))
    return choice


def _logprobs(of_tokens: list[dict[int, Logprob] | None]) -> Iterator[list[dict[str, Any]] | None]:
    """For each token: itself, then the likeliest ones, best first; None where there are no log-probabilities."""
    for of_token in of_tokens:
        yield of_token and [
            {"token_id": token_id, "token": value.decoded_token, "logprob": value.logprob, "rank": value.rank}
            for token_id, value in of_token.items()
        ]
