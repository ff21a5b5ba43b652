"""What an engine's process and its client say to each other: pickled objects, each behind its length.

The client sends its orders first, and then commands: `Add`, `Abort`, `More`, and for a page that shows the engine
`Watch`, `Pace`, `ForgetCache`. The process answers with its `Facts`, or with the error that keeps it from serving, and
then to each `More` with (statistics, news, traces): of each request that got something, what is new since its last
news, and the traces of steps since the last. `Outgoing` finds that there, and `RemoteRequest` (`remote/request.py`)
takes it here.

Both processes are of one program, and their socket has no name that others could connect to: hence pickle.
"""

import pickle
import struct
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, NamedTuple

from nanovllm.engine.request import Progress, Request, is_last
from nanovllm.engine.step_trace import EngineShape
from nanovllm.errors import EngineDeadError
from nanovllm.outputs import RequestMetrics, TokenLogprobs
from nanovllm.sampling_params import SamplingParams

LENGTH = struct.Struct("<Q")


class Orders(NamedTuple):
    """What an engine is to be. `options` are those of `Config`."""

    index: int
    model: str
    options: dict[str, Any]
    log_level: int


class Facts(NamedTuple):
    """What a client must know of an engine that serves."""

    default_sampling: dict[str, Any]
    shape: EngineShape


class Add(NamedTuple):
    """Run a request. `key` names it in all that is said of it later; `arrival_time` is by `time.monotonic()`."""

    key: int
    text: str | None
    token_ids: list[int]
    params: SamplingParams
    request_id: str
    arrival_time: float


class Abort(NamedTuple):
    key: int


class More(NamedTuple):
    """The client has handled the last message, and waits for the next."""


class Watch(NamedTuple):
    """Trace steps from now on, or stop.

    Attributes:
        is_teaching: every step, and with the texts of requests. Otherwise steps are left out where tracing them would
            cost too much, and texts stay in the engine.
    """

    is_on: bool
    is_teaching: bool = False


class Pace(NamedTuple):
    """How steps follow each other, see `Pacing`. `num_steps` more are allowed if there is work for them."""

    is_paused: bool = False
    num_steps: int = 0
    delay_s: float = 0.0


class ForgetCache(NamedTuple):
    """Empty the prefix cache."""


# Of a completion: its Progress, and the token ids, pieces of text and log-probabilities since the last.
Advance = tuple[Progress, list[int], list[str] | None, list[TokenLogprobs]]


class News(NamedTuple):
    """What is new of a request.

    Attributes:
        of: each completion's advance; or the error that has ended the request.
        start: with the first news: how many tokens the cache had, and the prompt's log-probabilities.
        metrics: with the first news and the last.
    """

    key: int
    of: list[Advance] | BaseException
    start: tuple[int, list[TokenLogprobs | None] | None] | None = None
    metrics: RequestMetrics | None = None


@dataclass(slots=True, eq=False)
class Outgoing:
    """A request in its engine's process, and how much of it the client knows."""

    key: int
    request: Request | None = None  # None until its prompt has been checked
    sent: list[Progress] = field(default_factory=list)

    def news(self, now: list[Progress] | BaseException) -> News:
        """What the client does not know yet, as of `now`. It then knows it."""
        if isinstance(now, BaseException):
            return News(self.key, plain(now))
        request, is_first = self.request, not self.sent
        seq = request.completions[0].seq
        before = self.sent or [Progress()] * len(now)
        self.sent = now
        return News(
            self.key,
            list(map(_advance, request.completions, before, now)),
            (seq.num_cached_tokens, seq.prompt_logprobs) if is_first else None,
            request.metrics if is_first or is_last(now) else None,
        )


def _advance(completion: Any, before: Progress, now: Progress) -> Advance:
    seq, text = completion.seq, completion.detokenizer
    return (
        now,
        seq.token_ids[seq.num_prompt_tokens + before.num_tokens : seq.num_prompt_tokens + now.num_tokens],
        text and text.pieces[before.num_pieces : now.num_pieces],
        seq.logprobs[before.num_tokens : now.num_tokens],
    )


def plain(error: BaseException) -> Exception:
    """The error as one that any process can unpickle: others' errors need more than their message."""
    for kind in (EngineDeadError, ValueError, TypeError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(str(error) if isinstance(error, RuntimeError) else repr(error))


def packed(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


def read(stream: BufferedReader) -> Any:
    """The next message. Raises EOFError if the other process has ended."""
    head = stream.read(LENGTH.size)
    body = stream.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    return pickle.loads(body)  # of nothing, too, it raises EOFError
