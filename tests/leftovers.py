"""Ranks that are killed, and what they must not leave behind, by the kernel's books and not by ours."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from inside import pids_of_ranks

from nanovllm import LLM, RankError, RequestOutput, SamplingParams


def kill_the_rank_of(llm: LLM, other: LLM, max_tokens: int) -> Iterator[RequestOutput]:
    """Kill rank 1 of `llm` while it and `other` each follow a stream, see how its own ends, and return the other's."""
    endless = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    stream, beside = llm.stream([[1, 2]], endless), other.stream([[1, 2]], endless)
    for _ in range(5):
        assert next(stream).outputs[0].token_ids == next(beside).outputs[0].token_ids
    (pid,) = rank_pids(llm)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(process {pid}\) was killed by signal 9\n.*make a new LLM"):
        for _ in stream:
            pass
    assert time.monotonic() - started < 5
    return beside


def rank_pids(llm: LLM) -> list[int]:
    return pids_of_ranks(llm)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends while it is read
        return False


def are_gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def rank_processes() -> set[int]:
    """The ranks that were started by this process."""
    return children_of(os.getpid(), "nanovllm.distributed.follower")


def children_of(pid: int, word: str) -> set[int]:
    """A process's children with this word in their command, by the kernel's books and not by ours."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and word in command:
            found.add(int(stat.parent.name))
    return found


def open_sockets() -> set[str]:
    links = (os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    return {link for link in links if link.startswith("socket:")}


def addresses_of(sockets: set[str]) -> list[str]:
    """What they are, for who must find out whose: "socket:[1234] 0100007F:6D7C 00000000:0000 0A" (0A: it listens)."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").open()]
    known = {f"socket:[{line[9]}]": " ".join(line[1:4]) for line in lines}
    return [f"{name} {known.get(name, 'not of TCP')}" for name in sorted(sockets)]


def shared_memory() -> set[str]:
    """Segments of NCCL and PyTorch; other programs have theirs beside them."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(("nccl", "torch", "cuda"))}
