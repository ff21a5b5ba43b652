"""What an engine did, step by step, as data: a trace is a file of JSON lines, and the server's page gets the same."""

from nanovllm.trace.record import record

__all__ = ["record"]
