"""Errors of ours that callers may want to catch by name."""


class RankError(RuntimeError):
    """Another rank has died, raised or stalled. All ranks have been ended: make a new LLM."""
