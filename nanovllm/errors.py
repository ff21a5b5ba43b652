"""Errors of ours that callers may want to catch by name."""


class EngineDeadError(RuntimeError):
    """The engine serves nothing any more: it has failed for good, was closed, or is another process's."""


class RankError(EngineDeadError):
    """Another rank has died, raised or stalled. All ranks have been ended: make a new LLM."""
