"""The iterator that `LLM.stream` returns. Any thread may take its outputs, or leave it."""

import weakref
from collections.abc import Callable, Generator, Iterator

from nanovllm.engine.one_caller import OneCaller
from nanovllm.engine.request import Request
from nanovllm.engine.text_engine import TextEngine
from nanovllm.outputs import RequestOutput


class OutputStream(Iterator[RequestOutput]):
    """The outputs of a stream's requests. Each `next` is a call of the `LLM`, which takes one call at a time.

    Closing or dropping it, in any thread, ends its requests: at once, or, if the engine is in a call, before the next
    step of that call. Garbage collection may close it within any call, so `close` itself only marks it as closed.

    Args:
        outputs: as `outputs_of` makes them.
        end_left: ends the requests of all streams that are over.
    """

    _is_closed = True  # so that __del__ works after a failed construction

    def __init__(
        self, outputs: Generator[RequestOutput, None, None], one_caller: OneCaller, end_left: Callable[[], None]
    ) -> None:
        self._outputs, self._one_caller, self._end_left = outputs, one_caller, end_left
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        """Whether no more outputs come: the reader has taken all, the stream has failed, or it was closed."""
        return self._is_closed or self._outputs.gi_frame is None

    def __next__(self) -> RequestOutput:
        """The next output. Raises RuntimeError during another call of the `LLM`."""
        if self.is_over:
            raise StopIteration
        with self._one_caller:
            try:
                return next(self._outputs)
            except BaseException:
                self._is_closed = True
                self._end_left()
                raise

    def close(self) -> None:
        """End its requests. You may call this again."""
        if not self._is_closed:
            self._is_closed = True
            if self._one_caller.enter_if_free():
                try:
                    self._end_left()
                finally:
                    self._one_caller.leave()

    def __del__(self) -> None:
        self.close()


def outputs_of(requests: list[Request], enter: Callable[[], TextEngine]) -> Generator[RequestOutput, None, None]:
    """Queue the requests, then step the engine and yield their outputs. The caller may close it between two of them.

    Args:
        enter: gives the text engine; raises EngineDeadError once it is closed.
    """
    text_engine = enter()
    for request in requests:
        text_engine.add(request)
    del text_engine  # an abandoned stream must not keep a closed engine's memory
    while requests:
        for request in requests:
            if request.has_output:
                request.has_news = False
                yield request.output(request.progress())
        requests = [r for r in requests if r.has_news or not r.is_finished]
        if any(not request.is_finished for request in requests):
            enter().step()


def abort_left_streams(streams: dict[weakref.ref[OutputStream], list[Request]], text_engine: TextEngine | None) -> None:
    """Take streams that are over or dropped off `streams`, and end their requests. Called between two steps."""
    for ref, requests in list(streams.items()):
        stream = ref()
        if stream is None or stream.is_over:
            if text_engine is not None:
                text_engine.abort(requests)
            del streams[ref]
