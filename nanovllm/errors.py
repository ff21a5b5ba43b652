"""The errors that a caller may want to catch by name."""


class EngineDeadError(RuntimeError):
    """The engine serves nothing any more: it has failed for good, was closed, or belongs to another process."""


class RankError(EngineDeadError):
    """A rank has died, raised an error or stalled, and all ranks were ended: make a new LLM."""
