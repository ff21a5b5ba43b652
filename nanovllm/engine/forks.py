"""A child forked by the user's program abandons the engine: it neither uses it nor destroys it.

The child has a copy of the parent's memory, but not its threads and not its device, and the ranks are not its children.
Destroying the engine there would kill the parent's ranks and let libraries (gloo, CUDA) tear down what the parent
still uses. So the child keeps it for ever: a memory page that is never written costs the child nothing.
"""

import ctypes
import os
import weakref
from typing import Any

FORKED = (
    "this process was forked off the one that made the engine, and has neither its threads nor its ranks nor its "
    "device: make an engine in this process, or start processes with 'spawn'"
)

_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def abandon_in_children(engine: Any) -> None:
    """From now on every forked child calls `engine.leave_to_parent()`, and never destroys the engine."""
    _engines.add(engine)


def _abandon_all() -> None:
    for engine in list(_engines):
        # An extra reference count, since the interpreter empties every list when it ends, and would destroy the engine.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        engine.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
