"""The iterator that `LLM.stream` gives, whose reader may take his outputs, or leave, in any thread."""

from collections.abc import Callable, Generator, Iterator

from nanovllm.engine.one_caller import OneCaller
from nanovllm.outputs import RequestOutput


class OutputStream(Iterator[RequestOutput]):
    """The outputs of a stream's requests, each step of which is a call of the `LLM`, alone in it.

    Closing or dropping it, in any thread, ends its requests: at once, or before the next step of whatever call the
    engine is at. Garbage may be collected within such a call, so nothing more is done here than to say so.

    Args:
        end_left: ends the requests of streams that are over.
    """

    _is_closed = True  # so that one whose construction failed can be dropped

    def __init__(
        self, outputs: Generator[RequestOutput, None, None], one_caller: OneCaller, end_left: Callable[[], None]
    ) -> None:
        self._outputs, self._one_caller, self._end_left = outputs, one_caller, end_left
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        """Whether no output is to come: all have been taken, it has failed, or it was closed."""
        return self._is_closed or self._outputs.gi_frame is None

    def __next__(self) -> RequestOutput:
        """Raises RuntimeError while another call of the `LLM` is under way."""
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
        """End its requests. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            if self._one_caller.enter_if_free():
                try:
                    self._end_left()
                finally:
                    self._one_caller.leave()

    def __del__(self) -> None:
        self.close()
