"""A rank other than 0: a process that runs the commands which arrive on its socket, until rank 0 kills it.

After a command that rank 0 waits for, it reports that it is done. When a command fails, it reports the traceback and
ends.
"""

import logging
import os
import pickle
import queue
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection

import torch

from nanovllm.config import Config
from nanovllm.distributed.groups import join_group
from nanovllm.distributed.parent import end_with_parent
from nanovllm.distributed.tensor_parallel import PeerLostError, TensorParallel
from nanovllm.models.sharded_state import save_shard
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.resolve import resolve_device
from nanovllm.worker.sleep import load_weights, sleep, wake_up

MAX_REPORT = 20_000  # characters: less than a socket's buffer, so that sending a report never blocks

Inbox = queue.SimpleQueue[tuple[str, tuple, bool]]  # command, arguments, whether rank 0 waits for the report


def follow(rank: int, parent: int, fd: int) -> None:
    """The follower's main function. `fd` is its end of the socket; the first message says which model to build."""
    end_with_parent(parent)
    link = Connection(fd)
    config: Config
    num_threads, config, hf_config, model_cls, path = pickle.loads(link.recv_bytes())
    torch.set_num_threads(num_threads)
    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # rank 0 logs the same warnings
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(link, inbox), daemon=True).start()
    timeout = timedelta(seconds=config.tensor_parallel_timeout)
    tp, runner, handle = TensorParallel(), None, None
    try:
        if resolve_device(config.device) == "cuda":
            torch.cuda.set_device(rank)
        link.send(None)
        while True:
            command, args, must_ack = inbox.get()
            match command:
                case "launch":
                    handle = runner.launch(*args)
                case "draw":
                    runner.draw(handle.awaits_masks, *args)
                    handle = None  # and with it the step's logits
                case "join":
                    tp = join_group(*args, rank, config.tensor_parallel_size, timeout)
                case "build":
                    runner = ModelRunner(config, hf_config, model_cls, path, tp)
                case "load_weights":
                    load_weights(runner, _tensors(inbox, runner))
                case "save_shard":
                    save_shard(runner.model, rank, *args)
                case "sleep":
                    sleep(runner, *args)
                case "wake_up":
                    wake_up(runner, *args)
            if must_ack:
                link.send(None)
    except BaseException as error:
        link.send((traceback.format_exc()[-MAX_REPORT:], isinstance(error, PeerLostError)))
        os._exit(1)


def _tensors(inbox: Inbox, runner: ModelRunner) -> Iterator[tuple[str, torch.Tensor]]:
    """Receive the weights, each announced and then broadcast by rank 0, one in memory at a time, until the last."""
    while True:
        command, args, _ = inbox.get()
        if command == "no_more_tensors":
            return
        name, shape, dtype = args
        yield name, runner.tp.broadcast(torch.empty(shape, dtype=dtype, device=runner.device))


def _receive(link: Connection, inbox: Inbox) -> None:
    """Empty the socket as messages arrive, so that rank 0's sends never wait for a step; end when rank 0 ends."""
    try:
        while True:
            inbox.put(pickle.loads(link.recv_bytes()))
    finally:
        os._exit(1)
