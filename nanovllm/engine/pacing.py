"""When an engine's thread may do its next step: at once, some time after the last, or only when somebody says so."""

import time


class Pacing:
    """Of the engine's thread, which others set by commands; `is_paused` any thread may set.

    Attributes:
        is_paused: no step, unless `num_allowed` says so.
        num_allowed: steps that may be done all the same.
        delay_s: seconds from the end of a step to the next.
    """

    def __init__(self) -> None:
        self.is_paused, self.num_allowed, self.delay_s = False, 0, 0.0
        self._not_before = 0.0

    def seconds_to_step(self) -> float | None:
        """0: the next step may be done now. None: not before somebody says so."""
        if self.is_paused:
            return 0.0 if self.num_allowed else None
        return max(0.0, self._not_before - time.monotonic()) if self.delay_s else 0.0

    def count_step(self) -> None:
        """A step was done."""
        self.num_allowed = max(0, self.num_allowed - 1)
        if self.delay_s:
            self._not_before = time.monotonic() + self.delay_s
