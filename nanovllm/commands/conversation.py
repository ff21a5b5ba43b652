"""A conversation that fits the model: its turns become a prompt, and the oldest are dropped when it grows too long."""

from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.prompts import Prompt
from nanovllm.text.chat import chat_prompt


@dataclass
class Turn:
    """What the user said, and what the model answered."""

    user: str
    assistant: str


@dataclass
class Conversation:
    """What was said so far: a system prompt, perhaps, and the turns, oldest first."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, tokenizer: Any, user: str) -> Prompt:
        """The prompt that asks for an answer to `user`, with its token ids.

        The tokenizer's chat template writes it. Without a template the model continues what was said so far.

        Raises:
            ValueError: the template does not take the conversation.
        """
        if tokenizer.chat_template:
            return chat_prompt(tokenizer, self._messages(user), add_generation_prompt=True)
        said = [part for turn in self.turns for part in (turn.user + "\n", turn.assistant + "\n")]
        text = "".join([*([self.system + "\n"] if self.system else []), *said, user + "\n"])
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text)}

    def _messages(self, user: str) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return [*messages, {"role": "user", "content": user}]

    def fitting_prompt(self, tokenizer: Any, user: str, most_tokens: int) -> tuple[Prompt, int]:
        """`prompt`, and how many of the oldest turns have to be left out to make it this short.

        Without turns it may be longer: then the engine refuses it. Raises as `prompt`.
        """
        prompt = {}
        for num_dropped in range(len(self.turns) + 1):
            prompt = Conversation(self.system, self.turns[num_dropped:]).prompt(tokenizer, user)
            if len(prompt["prompt_token_ids"]) <= most_tokens:
                break
        return prompt, num_dropped


def most_prompt_tokens(max_model_len: int, max_tokens: int | None) -> int:
    """How long a prompt may be so that an answer has room: `max_tokens`, or at most a quarter of the model's length."""
    quarter = max_model_len // 4
    return max_model_len - max(1, quarter if max_tokens is None else min(max_tokens, quarter))
