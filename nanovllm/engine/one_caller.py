"""Refuses a call that begins during another one: only one thread at a time may change an engine's books.

Threads may take turns. The second call raises an error instead of waiting: a program that calls one `LLM` from several
threads wants their requests to share batches. `AsyncLLM` does that; waiting would hide that `LLM` does not.
"""

import sys
import threading
from types import FrameType

HELD_BY_ANOTHER = (
    "another thread is in a call of this LLM, which takes one call at a time: let the threads take turns, or use "
    "AsyncLLM, which serves many callers at once"
)
HELD_BY_ITSELF = (
    "this thread is in a call of this LLM already, and makes another from within it (in a signal handler, or in a "
    "generator given to load_weights): let the first return, or use AsyncLLM, which serves many callers at once"
)


class OneCaller:
    """`with one_caller:` raises RuntimeError while another such block runs.

    It remembers the frame that entered the block, instead of locking a lock. A KeyboardInterrupt may come just before
    the block begins or just after it ends, and would leave a lock locked for ever. A frame that no thread executes any
    more keeps no caller out.
    """

    def __init__(self) -> None:
        self._inside: dict[str, FrameType] = {}  # no entry or one; setdefault is atomic
        self._removing = threading.Lock()

    def __enter__(self) -> None:
        thread_id = self._try_enter(sys._getframe(1))
        if thread_id is not None:
            raise RuntimeError(HELD_BY_ITSELF if thread_id == threading.get_ident() else HELD_BY_ANOTHER)

    def __exit__(self, *exc_info: object) -> None:
        self.leave()

    def enter_if_free(self) -> bool:
        """Enter, and return True: then call `leave`. False: another call is inside."""
        return self._try_enter(sys._getframe(1)) is None

    def leave(self) -> None:
        self._inside.clear()

    def require_no_other_thread(self) -> None:
        """Raises RuntimeError if another thread is inside. The current thread may be."""
        holder = self._inside.get("frame")
        if holder is not None and _thread_that_executes(holder) not in (None, threading.get_ident()):
            raise RuntimeError(HELD_BY_ANOTHER)

    def _try_enter(self, frame: FrameType) -> int | None:
        """Let the frame in, and return None; or return the id of the thread that is inside."""
        while (holder := self._inside.setdefault("frame", frame)) is not frame:
            thread_id = _thread_that_executes(holder)
            if thread_id is not None:
                return thread_id
            with self._removing:
                if self._inside.get("frame") is holder:
                    self._inside.clear()
        return None


def _thread_that_executes(frame: FrameType) -> int | None:
    # Without this call's own frame, which would keep itself, and `frame`, until garbage is collected.
    frames = sys._current_frames() | {threading.get_ident(): sys._getframe(1)}
    for thread_id, innermost in frames.items():
        caller: FrameType | None = innermost
        while caller is not None:
            if caller is frame:
                return thread_id
            caller = caller.f_back
    return None
