"""What becomes of an engine in a child that the user's program forks: it stays as it is, and nobody can use it.

The child has a copy of the parent's memory, but neither its threads nor its device, and the ranks are not its children.
To take the engine down there would kill the parent's ranks, and have libraries (gloo, CUDA) take down what is the
parent's too. So it is kept for ever: a page that is never written costs the child nothing.
"""

import ctypes
import os
import weakref
from typing import Any

FORKED = (
    "this process was forked off the one that made the engine, and has neither its threads nor its ranks nor its "
    "device: make an engine in this process, or start processes by 'spawn'"
)

_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_in_children(engine: Any) -> None:
    """Have every child that is forked from now on never destroy `engine`, and call its `leave_to_parent()`."""
    _engines.add(engine)


def _keep() -> None:
    for engine in list(_engines):
        # A list would not do: the interpreter empties it when it ends, and then the engine would go after all.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        engine.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)
