"""Conversations become prompts: the tokenizer's chat template, a Jinja program, writes them out."""

from typing import Any

_OPTIONS = {
    "chat_template": (str | None, "a string or None"),
    "chat_template_kwargs": (dict | None, "a dict or None"),
    "tools": (list | tuple | None, "a list of JSON schemas or None"),
    "add_generation_prompt": (bool, "True or False"),
    "continue_final_message": (bool, "True or False"),
}


def chat_prompts(tokenizer: Any, messages: Any, **options: Any) -> list[dict[str, Any]]:
    """`chat_prompt` of a conversation, or of each of a list of conversations. Raises as it does."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"messages={messages!r:.80} must be a list of messages, or of such lists, and not empty")
    if isinstance(messages[0], dict):
        return [chat_prompt(tokenizer, messages, **options)]
    return [chat_prompt(tokenizer, one, name=f"messages[{i}]", **options) for i, one in enumerate(messages)]


def chat_prompt(
    tokenizer: Any,
    messages: Any,
    name: str = "messages",
    chat_template_kwargs: dict[str, Any] | None = None,
    **template_options: Any,
) -> dict[str, Any]:
    """The prompt, with its text and its ids, for one conversation.

    Args:
        messages: `[{"role": "user", "content": "…"}, …]`.
        name: what to call them in an error.
        chat_template_kwargs: what the template knows besides; they must not name one of the
        template_options: what `apply_chat_template` of a `transformers` tokenizer takes; see `LLM.chat`.

    Raises:
        TypeError: the messages or an option have another form.
        ValueError: there is no template, or it does not take them.
    """
    for option, value in {"chat_template_kwargs": chat_template_kwargs, **template_options}.items():
        kind, allowed = _OPTIONS[option]
        if not isinstance(value, kind):
            raise TypeError(f"{option}={value!r:.80} must be {allowed}")
    twice = template_options.keys() & (chat_template_kwargs or {})
    if twice:
        raise ValueError(
            f"chat_template_kwargs={chat_template_kwargs!r:.80} must not have {min(twice)!r}: give it itself"
        )
    if template_options.get("add_generation_prompt") and template_options.get("continue_final_message"):
        raise ValueError("continue_final_message=True goes on with the last message: set add_generation_prompt=False")
    is_list = isinstance(messages, (list, tuple)) and len(messages) > 0
    if not is_list or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise TypeError(f"{name}={messages!r:.80} must be a list of dicts with 'role' and 'content', and not empty")
    template_options |= chat_template_kwargs or {}
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **template_options)
    except Exception as error:  # a template is a program: it may raise what it likes
        raise ValueError(f"the chat template does not take {name}: {error}") from error
    # The template writes what special tokens there are to be.
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
