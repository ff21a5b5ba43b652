"""What the ranks of an engine must not leave behind, by the kernel's books and not by ours."""

import os
import time
from pathlib import Path

from nanovllm import LLM


def rank_pids(llm: LLM) -> list[int]:
    return [process.pid for process in llm.engine.followers._processes]


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
    """Processes that multiprocessing has spawned from this one, by the kernel's books and not by ours."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and "spawn_main" in command:
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
