"""Starts a program of ours in an interpreter like this one: what ranks and engines in processes of their own run in."""

import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import spawn
from pathlib import Path
from typing import Any

PACKAGES = str(Path(__file__).parents[2])  # the folder that has this package


def start_interpreter(
    program: str, fd: int, env: Mapping[str, str] | None = None, **values: Any
) -> "subprocess.Popen[bytes]":
    """Run a program with its end of a socket.

    Args:
        program: Python, in which `{path}`, `{parent}` and `{fd}` are replaced by this interpreter's modules' folders,
            this process's id and `fd`, and others by `values`.
        fd: the descriptor that the program inherits.
        env: added to this process's environment.
    """
    path = [*map(str, sys.path), PACKAGES]
    text = program.format(path=path, parent=os.getpid(), fd=fd, **values)
    command = [os.fsdecode(spawn.get_executable()), "-c", text]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[fd], env={**os.environ, **(env or {})})
