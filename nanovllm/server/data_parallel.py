"""Several engines, each a process with devices of its own: starts them, and starts one that has ended again.

An engine owns nothing that outlives it. Its socket has no name on the disk: the folder that it was bound in is removed
at once, and the front reaches it through a descriptor. However the front ends, the engines end with it: they see their
lifeline close (`engine_process.py`), and on Linux the kernel signals them besides.
"""

import asyncio
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from nanovllm.server.response_store import MOST_ENGINES
from nanovllm.server.settings import ServerSettings

logger = logging.getLogger(__name__)
END_S = 10.0  # for engines without requests to end by themselves
LONGEST_PAUSE_S = 30.0  # before an engine that does not come up is started again
PACKAGES = str(Path(__file__).parents[2])  # the folder that has this package
PROGRAM = """
import sys
sys.path[:] = {path!r}
from nanovllm.distributed.parent import end_with_parent
end_with_parent({parent})
from nanovllm.server.engine_process import run
run({lifeline}, {listener})
"""


@dataclass(slots=True, eq=False)
class Engine:
    """One of the engines, as the front knows it.

    Attributes:
        address: of its socket; None while it does not serve.
        num_active: requests that it has now.
        process: the last one that was started.
    """

    index: int
    address: str | None = None
    num_active: int = 0
    num_restarts: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)


class Engines:
    """N engines of one model.

        async with Engines(2, model, options, settings) as engines:
            engines.all[0].address

    It waits until all serve. Raises ChildProcessError if one cannot, ValueError if there are too few devices.

    Attributes:
        facts: what the engines have told of themselves: `name`, `max_num_seqs`.
        end_at_once: leaving the block kills them, instead of giving them END_S to end.
    """

    def __init__(self, size: int, model: str, options: dict[str, Any], settings: ServerSettings) -> None:
        if not 2 <= size <= MOST_ENGINES:
            raise ValueError(f"data_parallel_size={size!r} must be an integer in [1, {MOST_ENGINES}]")
        self.all = [Engine(index) for index in range(size)]
        self.facts: dict[str, Any] = {}
        self.end_at_once = False
        self._devices = devices_of_engines(size, options)
        self._is_ending = self._have_started = False
        self._keepers: list[asyncio.Task[None]] = []
        # What the front does for all of them it does alone; the bounds are those of the settings in all.
        limits = replace(settings.limits, stored_responses=-(-settings.limits.stored_responses // size))
        settings = replace(settings, api_keys=[], allowed_origins=[], limits=limits)
        level = logging.getLogger().getEffectiveLevel()
        self._orders = [
            pickle.dumps((model, options, replace(settings, engine_index=index), level)) for index in range(size)
        ]

    async def __aenter__(self) -> "Engines":
        self._keepers = [asyncio.ensure_future(self._keep(engine)) for engine in self.all]
        ready = asyncio.ensure_future(self._wait_until_ready())
        try:
            await asyncio.wait({ready, *self._keepers}, return_when=asyncio.FIRST_COMPLETED)
            for keeper in self._keepers:
                if keeper.done():
                    keeper.result()
        except BaseException:
            self.end_at_once = True
            await self.__aexit__()
            raise
        finally:
            ready.cancel()
        self._have_started = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_ending = True
        for engine, keeper in zip(self.all, self._keepers, strict=True):
            if engine.address is None or engine.process is None or self.end_at_once:
                keeper.cancel()
            else:
                engine.process.terminate()
        await asyncio.wait(self._keepers, timeout=END_S)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)  # the first error is raised already

    async def _wait_until_ready(self) -> None:
        for engine in self.all:
            await engine.is_ready.wait()

    async def _keep(self, engine: Engine) -> None:
        """Start an engine, and again whenever it ends. Raises ChildProcessError if it ends before all serve."""
        pause_s = 1.0
        while True:
            try:
                reason = await self._live(engine)
            except OSError as error:
                reason = str(error)
            if self._is_ending:
                return
            if not self._have_started:
                raise ChildProcessError(f"engine {engine.index} has ended before all engines served: {reason}")
            logger.error("engine %d has ended (%s), and is started again", engine.index, reason or "it served before")
            if reason:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                pause_s = 1.0
            engine.num_restarts += 1

    async def _live(self, engine: Engine) -> str:
        """One life of an engine's process, until it ends. Returns why it did not serve; empty if it did.

        Raises OSError if it cannot be started.
        """
        listener, handle = private_listener()
        ours, theirs = socket.socketpair()
        writer = None
        try:
            with listener, theirs:
                engine.process = _start(theirs, listener, self._devices[engine.index])
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            writer.write(self._orders[engine.index])
            line = await reader.readline()
            facts = json.loads(line) if line else {"error": "what it wrote stands above"}
            if "error" in facts:
                return facts["error"]
            self.facts.update(facts)
            engine.address = f"/proc/self/fd/{handle}"
            engine.is_ready.set()
            await reader.read()  # it says nothing more: this is its end
            return ""
        finally:
            engine.address = None
            os.close(handle)
            (writer or ours).close()
            if engine.process is not None:
                engine.process.kill()
                await asyncio.to_thread(engine.process.wait)


def private_listener() -> tuple[socket.socket, int]:
    """A listening socket without a name, and a descriptor of it: /proc/self/fd/… is its address for this process."""
    listener = socket.socket(socket.AF_UNIX)
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:  # which nobody else may enter
        path = f"{folder}/engine"
        listener.bind(path)
        listener.listen(2048)
        return listener, os.open(path, os.O_PATH)


def devices_of_engines(size: int, options: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the environment of each engine says of devices: tensor_parallel_size of them each; nothing on a CPU.

    Raises ValueError if there are too few.
    """
    if options.get("device") == "cpu":
        return [{}] * size
    import torch  # takes a second, and without it a missing device would mean a CPU

    num_devices, each = torch.cuda.device_count(), options.get("tensor_parallel_size", 1)
    if num_devices == 0:
        return [{}] * size  # the engine itself refuses device="cuda"
    if size * each > num_devices:
        raise ValueError(
            f"data_parallel_size={size} with tensor_parallel_size={each} needs {size * each} devices; "
            f"{num_devices} are visible"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(num_devices)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} for i in range(size)]


def _start(lifeline: socket.socket, listener: socket.socket, devices: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start `nanovllm.server.engine_process.run` in an interpreter like this one."""
    fds = {"lifeline": lifeline.fileno(), "listener": listener.fileno()}
    program = PROGRAM.format(path=[*map(str, sys.path), PACKAGES], parent=os.getpid(), **fds)
    return subprocess.Popen(
        [os.fsdecode(spawn.get_executable()), "-c", program], stdin=subprocess.DEVNULL, pass_fds=list(fds.values()),
        env={**os.environ, **devices}, process_group=0,  # Ctrl-C in a terminal is for the front alone
    )  # fmt: skip
