"""Several ranks in one process, a thread each: what they compute, without the seconds that processes take to start.

Only what carries commands and sums is other than in `nanovllm/distributed`; each rank has its own `ModelRunner` and its
share of the weights. Use it inside `with ranks_in_threads():`, around making an engine and using it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from nanovllm.config import Config
from nanovllm.distributed import ranks
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.worker.model_runner import ModelRunner
from nanovllm.worker.resolve import require_cut


@dataclass(slots=True)
class Meeting:
    """Where the ranks' threads exchange tensors. If one fails, the others' waits fail too."""

    size: int
    tensors: list[torch.Tensor | None] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.tensors, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=60)


@dataclass(slots=True)
class ThreadGroup:
    """One rank's connection to the others, as `tensor_parallel.Group` wants it."""

    rank: int
    meeting: Meeting

    def all_reduce(self, x: torch.Tensor, is_minimum: bool = False) -> None:
        parts = torch.stack(self._exchange(x.clone()))
        x.copy_(parts.amin(0) if is_minimum else parts.sum(0))

    def all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        out.copy_(torch.cat(self._exchange(part.clone())))

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._exchange(x.clone())[0])

    def abort(self) -> None:
        self.meeting.barrier.abort()

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.tensors[self.rank] = x
        self.meeting.barrier.wait()
        everyones = list(self.meeting.tensors)
        self.meeting.barrier.wait()  # nobody brings the next tensors before all have these
        return everyones


class ThreadFollowers:
    """Takes the place of `distributed.ranks.Followers`, as far as an engine that only generates needs it."""

    error = None

    def __init__(self, config: Config) -> None:
        self.config, self.size = config, config.tensor_parallel_size
        meeting, whole = Meeting(self.size), config.enable_expert_parallel
        groups = [ThreadGroup(rank, meeting) for rank in range(self.size)]
        self.tps = [TensorParallel(rank, self.size, group, whole_experts=whole) for rank, group in enumerate(groups)]
        self.tp = self.tps[0]
        self.commands: list[SimpleQueue[tuple[str, tuple]]] = [SimpleQueue() for _ in self.tps[1:]]
        self.threads: list[threading.Thread] = []

    def start(self, hf_config: Any, model_cls: type, path: Path) -> None:
        require_cut(self.config, hf_config, model_cls)
        for tp, commands in zip(self.tps[1:], self.commands, strict=True):
            model = (self.config, hf_config, model_cls, path, tp)
            self.threads.append(threading.Thread(target=self._follow, args=(commands, model), daemon=True))
            self.threads[-1].start()

    @contextmanager
    def also_run(self, command: str, *args: Any, wait: bool = False) -> Iterator[None]:
        for commands in self.commands:
            commands.put((command, args))
        yield

    @contextmanager
    def time_limit(self) -> Iterator[None]:
        yield

    def check(self) -> None: ...

    def close(self) -> None:
        for commands in self.commands:
            commands.put(("end", ()))
        for thread in self.threads:
            thread.join()

    def leave_to_parent(self) -> None: ...

    def _follow(self, commands: SimpleQueue, model: tuple) -> None:
        runner = handle = None
        try:
            while True:
                command, args = commands.get()
                if command == "end":
                    return
                if command == "build":
                    runner = ModelRunner(*model)
                elif command == "draw":
                    runner.draw(handle.awaits_masks, *args)
                else:
                    handle = runner.launch(*args)
        except BaseException:
            self.tp.group.abort()
            raise


@contextmanager
def ranks_in_threads() -> Iterator[None]:
    """Engines that are made inside have their ranks in threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "Followers", ThreadFollowers)
        yield
