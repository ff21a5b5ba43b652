"""Conversations become prompts: the tokenizer's chat template, a Jinja program, writes them out."""

from collections.abc import Callable
from typing import Any

from nanovllm.text.messages import CONTENT_FORMATS, as_template_takes, content_format, is_object, plain
from nanovllm.text.surrogates import refuse_surrogates

_OPTIONS = {
    "chat_template": (str | None, "a string or None"),
    "chat_template_content_format": (str, f"one of {', '.join(CONTENT_FORMATS)}"),
    "chat_template_kwargs": (dict | None, "a dict or None"),
    "tools": (list | tuple | None, "a list of JSON schemas or None"),
    "add_generation_prompt": (bool, "True or False"),
    "continue_final_message": (bool, "True or False"),
}


def chat_prompts(tokenizer: Any, messages: Any, **options: Any) -> list[dict[str, Any]]:
    """`chat_prompt` for one conversation, or for each of a list of them. Raises as it does."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"messages={messages!r:.80} must be a list of messages, or of such lists, and not empty")
    if isinstance(messages[0], dict) or is_object(messages[0]):
        return [chat_prompt(tokenizer, messages, **options)]
    return [chat_prompt(tokenizer, one, name=f"messages[{i}]", **options) for i, one in enumerate(messages)]


def chat_prompt(
    tokenizer: Any,
    messages: Any,
    name: str = "messages",
    chat_template_kwargs: dict[str, Any] | None = None,
    chat_template_content_format: str = "auto",
    **template_options: Any,
) -> dict[str, Any]:
    """The prompt, with its text and its token ids, for one conversation.

    Args:
        messages: `[{"role": "user", "content": "…"}, …]`. Content may be a list of parts
            `{"type": "text", "text": "…"}`, or None beside tool calls, whose arguments may be JSON strings:
            `text/messages.py` takes all forms.
        name: what an error calls the messages.
        chat_template_kwargs: further variables of the template, `{"enable_thinking": False}` for one.
        chat_template_content_format: the template gets content as a "string", or as a list of parts ("openai").
            "auto": in the form that the template handles.
        template_options: for `apply_chat_template` of the `transformers` tokenizer:
            chat_template: a Jinja template instead of the tokenizer's.
            add_generation_prompt: begin the assistant's message, which the model is to write.
            continue_final_message: leave the last message open, for the model to continue; not with the former.
            tools: JSON schemas of functions, for templates that know them.

    Raises:
        TypeError: the messages or an option have another form.
        ValueError: there is no template, or it does not take the messages; a part of a message is no text.
    """
    options = {
        "chat_template_kwargs": chat_template_kwargs,
        "chat_template_content_format": chat_template_content_format,
        **template_options,
    }
    for option, value in options.items():
        kind, allowed = _OPTIONS[option]
        if not isinstance(value, kind):
            raise TypeError(f"{option}={value!r:.80} must be {allowed}")
    if chat_template_content_format not in CONTENT_FORMATS:
        raise ValueError(
            f"chat_template_content_format={chat_template_content_format!r:.80} must be one of "
            f"{', '.join(CONTENT_FORMATS)}"
        )
    twice = template_options.keys() & (chat_template_kwargs or {})
    if twice:
        raise ValueError(
            f"chat_template_kwargs={chat_template_kwargs!r:.80} must not have {min(twice)!r}: pass it by itself"
        )
    if template_options.get("add_generation_prompt") and template_options.get("continue_final_message"):
        raise ValueError("continue_final_message=True extends the last message: set add_generation_prompt=False")
    conversation = plain(messages, name)
    is_list = isinstance(conversation, list) and len(conversation) > 0
    if not is_list or not all(isinstance(message, dict) and "role" in message for message in conversation):
        raise TypeError(f"{name}={messages!r:.80} must be a list of dicts with 'role' and 'content', and not empty")
    options = {option: plain(value, option) for option, value in template_options.items()}
    options |= plain(chat_template_kwargs or {}, "chat_template_kwargs")

    def call_template(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:  # a template is a program, which may raise any error
            raise ValueError(f"the chat template does not take {name}: {error}") from error

    form = chat_template_content_format
    if form == "auto":
        template = call_template(tokenizer.get_chat_template, options.get("chat_template"), options.get("tools"))
        form = call_template(content_format, template)
    conversation = [as_template_takes(m, form, f"{name}[{i}]") for i, m in enumerate(conversation)]
    text = call_template(tokenizer.apply_chat_template, conversation, tokenize=False, **options)
    refuse_surrogates(text, f"what the chat template makes of {name}")
    # The template has written all special tokens itself.
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
