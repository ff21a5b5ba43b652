"""Conversations become prompts: the tokenizer's chat template, a Jinja program, writes them out."""

from typing import Any


def chat_prompts(
    tokenizer: Any, messages: Any, chat_template_kwargs: dict[str, Any] | None = None, **template_options: Any
) -> list[dict[str, Any]]:
    """A prompt, with its text and its ids, for a conversation or for each of a list of conversations.

    Args:
        messages: `[{"role": "user", "content": "…"}, …]`, or a list of such lists.
        chat_template_kwargs: what the template knows besides; they must not name one of the
        template_options: what `apply_chat_template` of a `transformers` tokenizer takes.

    Raises:
        TypeError: messages are not of this form; ValueError: there is no template, or it does not take them.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"messages={messages!r:.80} must be a list of messages, or of such lists, and not empty")
    twice = template_options.keys() & (chat_template_kwargs or {})
    if twice:
        raise ValueError(
            f"chat_template_kwargs={chat_template_kwargs!r:.80} must not have {min(twice)!r}: give it itself"
        )
    template_options |= chat_template_kwargs or {}
    conversations = [messages] if isinstance(messages[0], dict) else messages
    if template_options.get("add_generation_prompt") and template_options.get("continue_final_message"):
        raise ValueError("continue_final_message=True goes on with the last message: set add_generation_prompt=False")
    prompts = []
    for i, conversation in enumerate(conversations):
        name = "messages" if conversation is messages else f"messages[{i}]"
        is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        if not is_list or not all(isinstance(message, dict) and "role" in message for message in conversation):
            raise TypeError(f"{name}={conversation!r:.80} must be a list of dicts with 'role' and 'content'")
        try:
            text = tokenizer.apply_chat_template(list(conversation), tokenize=False, **template_options)
        except Exception as error:  # a template is a program: it may raise what it likes
            raise ValueError(f"the chat template does not take {name}: {error}") from error
        # The template writes what special tokens there are to be.
        prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
    return prompts
