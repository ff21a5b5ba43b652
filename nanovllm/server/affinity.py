"""Which of several engines gets a request: the one whose cache has its beginning, unless that one has more to do."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

CHARS = 1024  # of each text that decides; more would part prompts that share only a long beginning
MARGIN = 16  # requests


def beginning(body: Any) -> bytes:
    """What decides where a request with this JSON body goes; empty if nothing of it does.

    Of a prompt, text or token ids, it is the first CHARS characters; of several prompts, the first one's. Of a
    conversation it is that much of the instructions and of each message up to the first one of the user: all turns of
    a conversation have it in common, and conversations under the same instructions differ in it.
    """
    if not isinstance(body, dict):
        return b""
    said = next((body[name] for name in ("messages", "input", "prompt") if body.get(name)), None)
    texts = [body.get("system"), body.get("instructions")]
    match said:
        case [dict(), *_]:
            for item in said:
                texts.append(item.get("content") if isinstance(item, dict) else item)
                if isinstance(item, dict) and item.get("role") == "user":
                    break
        case [str() | list() as first, *_]:
            texts.append(first)
        case _:
            texts.append(said)
    return "\0".join(_cut(text) for text in texts if text).encode(errors="backslashreplace")


def choose(beginning: bytes, loads: Sequence[int | None], margin: int = MARGIN) -> int | None:
    """The index of the engine for a request with this beginning; None if none serves.

    Each engine draws a number for the beginning, by a hash, and the highest wins: so requests that begin alike meet in
    one engine's prefix cache, and if an engine ends or comes back, only the requests that it wins change their place.
    If the winner has over `margin` more requests than the one with the fewest, that one gets the request; it also gets
    those that have no beginning.

    Args:
        loads: requests that each engine has now; None: it does not serve.
    """
    serving = [i for i, load in enumerate(loads) if load is not None]
    if not serving:
        return None
    least = min(serving, key=lambda i: loads[i])
    if not beginning:
        return least
    winner = max(serving, key=lambda i: blake2b(beginning, digest_size=8, key=b"%d" % i).digest())
    return winner if loads[winner] - loads[least] <= margin else least


def _cut(text: Any) -> str:
    return text[:CHARS] if isinstance(text, str) else str(text[:CHARS] if isinstance(text, list) else text)[:CHARS]
