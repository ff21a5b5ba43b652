"""One of several engines behind a front: a process that serves HTTP on a socket which only the front can reach.

It gets its orders over a second socket, its *lifeline*, and answers there with a line of JSON when it serves, or with
the reason why it cannot. The lifeline closes when either process ends, and so the other one knows.
"""

import json
import logging
import os
import pickle
import signal
import socket
import threading

from nanovllm.server.launch import serve
from nanovllm.server.state import ServerState

TICK_S = 0.5  # between two looks at the engine's health


def run(lifeline_fd: int, listener_fd: int) -> None:
    """The process's main function. SIGTERM finishes its requests first, as with any server."""
    lifeline, listener = socket.socket(fileno=lifeline_fd), socket.socket(fileno=listener_fd)
    with lifeline.makefile("rb") as orders:
        model, options, settings, log_level = pickle.load(orders)
    logging.basicConfig(level=log_level, format=f"%(asctime)s engine {settings.engine_index}: %(message)s")
    logging.getLogger("nanovllm.access").setLevel(logging.WARNING)  # the front has a line for each request

    has_served = False

    def ready(state: ServerState) -> None:
        nonlocal has_served
        has_served = True
        tell(lifeline, {"name": state.names[0], "max_num_seqs": state.llm.config.max_num_seqs})
        threading.Thread(target=watch, args=(lifeline, state), daemon=True).start()

    try:
        serve(model, options, settings, listener, ready=ready)
    except (TypeError, ValueError, OSError) as error:  # the command's user sees it as one line
        if has_served:
            raise
        tell(lifeline, {"error": str(error)})


def tell(lifeline: socket.socket, facts: dict[str, str | int]) -> None:
    lifeline.sendall(json.dumps(facts).encode() + b"\n")


def watch(lifeline: socket.socket, state: ServerState) -> None:
    """End this process with the front, and once its engine has failed for good: the front then starts another."""
    lifeline.settimeout(TICK_S)
    while True:
        try:
            if not lifeline.recv(1):
                os._exit(1)
        except TimeoutError:
            if state.llm.errored and not state.is_draining:
                os.kill(os.getpid(), signal.SIGTERM)
