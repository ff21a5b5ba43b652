"""Three loads that show what an engine does: a shared beginning, a full cache, a long prompt among short answers.

Their sizes follow the engine's, so that each shows what it promises on any engine that can show it.
"""

from typing import NamedTuple

from nanovllm.engine.step_trace import EngineShape

SCENES = ("shared", "fill", "long")
MOST_FILLING = 64  # requests
# What the prompts are cut from.
TEXT = """
def read_config(path):
    with open(path) as file:
        values = json.load(file)
    for name in REQUIRED:
        if name not in values:
            raise ValueError(f"{path} lacks {name}")
    return Config(**values)

def average(numbers):
    total = 0
    for number in numbers:
        total += number
    return total / len(numbers)

class Queue:
    def __init__(self, size):
        self.size = size
        self.items = []

    def put(self, item):
        if len(self.items) >= self.size:
            raise OverflowError("the queue is full")
        self.items.append(item)
"""


class SceneRequest(NamedTuple):
    """A prompt of a scene; its answer goes on to `max_tokens`, whatever it says."""

    token_ids: list[int]
    max_tokens: int


# What one sees, with teaching sizes: a small cache of small blocks, and a budget that cuts prompts into chunks.
TEACHING = {"num_kvcache_blocks": 24, "kvcache_block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def scene(name: str, text_ids: list[int], shape: EngineShape) -> list[SceneRequest]:
    """The requests of a scene, in order of arrival.

    Args:
        text_ids: the tokens of TEXT, without special tokens.

    Raises:
        ValueError: there is no such scene, or the engine's sizes cannot show it.
    """
    if name not in SCENES:
        raise ValueError(f"scene={name!r} must be one of {', '.join(SCENES)}")
    made = {"shared": _shared, "fill": _fill, "long": _long}[name](text_ids, shape)
    longest = max(len(token_ids) + max_tokens for token_ids, max_tokens in made)
    if longest > shape.max_model_len:
        raise ValueError(f"scene={name!r} has a request of {longest} tokens; max_model_len is {shape.max_model_len}")
    return made


def _cut(text_ids: list[int], start: int, number: int) -> list[int]:
    """So many tokens of the text, repeated without end, from `start` on."""
    start %= len(text_ids)
    return (text_ids * (-(-(start + number) // len(text_ids))))[start : start + number]


def _shared(text_ids: list[int], shape: EngineShape) -> list[SceneRequest]:
    """Ten requests that begin with the same three blocks."""
    beginning = _cut(text_ids, 0, 3 * shape.block_size)
    return [SceneRequest(beginning + _cut(text_ids, 7 * i, 4), 12 + 2 * i) for i in range(10)]


def _fill(text_ids: list[int], shape: EngineShape) -> list[SceneRequest]:
    """Requests that fit at first, and together grow to one and a half times the cache."""
    size = shape.block_size
    number = min(shape.max_num_seqs, shape.max_num_batched_tokens, MOST_FILLING)
    num_groups = len(shape.windows)
    num_blocks = min(-(-3 * shape.num_blocks // (2 * number * num_groups)), shape.max_model_len // size)
    if number * num_blocks * num_groups <= shape.num_blocks or num_blocks < 2:
        raise ValueError(
            f"scene='fill' needs a smaller cache: {number} requests of max_model_len={shape.max_model_len} do not "
            f"fill {shape.num_blocks} blocks of {size} tokens"
        )
    prompts = [_cut(text_ids, 11 * i, size + size // 2) for i in range(number)]
    return [SceneRequest(token_ids, num_blocks * size - len(token_ids)) for token_ids in prompts]


def _long(text_ids: list[int], shape: EngineShape) -> list[SceneRequest]:
    """Three short requests, and behind them a prompt of three steps' budget."""
    short = [SceneRequest(_cut(text_ids, 5 * i, 6), 24) for i in range(3)]
    return [*short, SceneRequest(_cut(text_ids, 40, 3 * shape.max_num_batched_tokens + 8), 8)]
