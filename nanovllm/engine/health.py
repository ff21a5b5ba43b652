"""Whether an engine can still serve, and why not: one answer for both fronts and for every new request.

Three things end an engine for good: a lost rank, a device that answers every call with an error, and a fork, whose
child has neither the parent's device nor its threads.
"""

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from nanovllm.engine.forks import FORKED, abandon_in_children
from nanovllm.errors import EngineDeadError

if TYPE_CHECKING:
    from nanovllm.distributed.ranks import Followers

LONGEST_STEP_S = 10.0  # the interpreter, on its way out, waits this long for a running step


class EngineHealth:
    """One engine's health. Any thread may ask.

    Attributes:
        stepping: a lock that the engine holds during a step.
    """

    def __init__(self, followers: "Followers") -> None:
        self._pid = os.getpid()
        self._followers = followers
        self._device_error = ""
        self.stepping = threading.RLock()

    def guard(self, engine: Any) -> None:
        """Let the interpreter end only between two steps of `engine`, and keep forked children from destroying it."""
        weakref.finalize(engine, _wait_for_step, self.stepping, self._pid)
        abandon_in_children(engine)

    @property
    def error(self) -> EngineDeadError | None:
        """Why the engine serves nothing any more; None while it does."""
        if os.getpid() != self._pid:
            return EngineDeadError(FORKED)
        if self._device_error:
            return EngineDeadError(
                f"the device has failed for good: {self._device_error}\nOnly a new process can use it again"
            )
        return self._followers.error

    def check(self) -> None:
        """Raises EngineDeadError if the engine serves nothing any more."""
        error = self.error
        if error is not None:
            raise error

    def require_own_process(self) -> None:
        """Raises EngineDeadError in a forked child of the engine's process."""
        if os.getpid() != self._pid:
            raise EngineDeadError(FORKED)

    def check_device_after(self, error: Exception, runner: Any) -> None:
        """After a step failed with `error`: raises EngineDeadError if the device has failed for good.

        After a "device-side assert" or an "illegal memory access" CUDA answers every call of the process with an error.
        """
        if isinstance(error, EngineDeadError):
            return
        try:
            runner.check_device()
        except Exception as lasting:
            self._device_error = str(lasting) or repr(lasting)
            raise EngineDeadError(str(self.error)) from error


def _wait_for_step(stepping: Any, pid: int) -> None:
    """When the interpreter ends: wait for the step that a daemon thread runs, and let it begin no other.

    PyTorch aborts the process if the interpreter ends a thread within PyTorch's code.
    """
    if os.getpid() == pid:
        stepping.acquire(timeout=LONGEST_STEP_S)
