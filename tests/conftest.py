"""Checkpoints and engines that the tests share. Everything runs offline and on one thread per worker."""

import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start: threads that wait spin
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background jobs. Programs that the tests start would inherit it, and know no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, which it must know before a test imports the first one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker() -> None:
    """Workers that each start a thread per core slow one another down, and sums then depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def transformers_is_loaded() -> None:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect_from_before(transformers_is_loaded: None) -> None:
    """An engine collects garbage when it closes, which would walk all that libraries and other files have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("name of a shape")`: its directory, made once a session."""
    from checkpoints import SEEDS, SHAPES, save_checkpoint

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_checkpoint(tmp_path_factory.mktemp(name), SHAPES[name], SEEDS.get(name, 0))
        return made[name]

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that writes random bytes, few of which are characters."""
    from checkpoints import SHAPES, save_byte_tokenizer, save_checkpoint

    path = save_checkpoint(tmp_path_factory.mktemp("text"), {**SHAPES["plain"], "vocab_size": 257})
    save_byte_tokenizer(path)
    return path


@pytest.fixture
def make_llm() -> Iterator[Callable[..., Any]]:
    """`make_llm(path, **options)`: a small float32 engine on the CPU without tokenizer, closed after the test.

    `with_graphs`: it pads and replays its steps as on a GPU (`called_graphs.py`).
    """
    from called_graphs import use_called_graphs

    from nanovllm import LLM

    made: list[LLM] = []

    def make(path: Path, max_behind: int | None = None, with_graphs: bool = False, **options: Any) -> LLM:
        defaults = {
            "device": "cpu",
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "kvcache_block_size": 16,
            "num_kvcache_blocks": 128,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 1024,
        }
        llm = LLM(str(path), **{**defaults, **options})
        if max_behind is not None:
            llm.engine.max_behind = max_behind
        made.append(llm)
        if with_graphs:
            use_called_graphs(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, socket, file or shared memory of the ranks outlives a test that has closed its engines."""
    from leftovers import addresses_of, open_sockets, rank_processes, shared_memory

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    sockets, shared = open_sockets(), shared_memory()
    yield
    assert not rank_processes()
    assert not list(folder.glob("nanovllm-*"))
    deadline = time.monotonic() + 5  # NCCL takes its own down once the last graph is gone
    while not (open_sockets() <= sockets and shared_memory() <= shared) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not addresses_of(open_sockets() - sockets)
    assert shared_memory() <= shared


@pytest.fixture
def make_tp(nothing_is_left: None, make_llm: Callable[..., Any]) -> Callable[..., Any]:
    """`make_llm`, whose engines are closed before the above looks."""
    return make_llm


# What takes longest begins first, so that all workers end together. The rest follows by its number of tests.
SLOWEST = (
    "server",
    "tests/kernels/test_compilation.py::test_every_kernel_compiles_for_hopper",
    "tests/test_sampling.py",
    "tests/distributed/test_ranks.py",
    "tests/distributed/test_tensor_parallel.py",
    "tests/test_chat_model.py",
    "tests/models/test_families.py",
    "tests/test_async_llm.py",
    "tests/test_parity.py",
    "tests/test_threads_and_signals.py",
    "tests/test_output_kinds.py",
    "tests/benchmarks/test_bench.py",
    "tests/benchmarks/test_bench_modes.py",
    "tests/engine/test_schedules.py",
    "remote",
)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs all tests of a file, or of the folders whose tests share a server, so that it makes what they
    share only once. Those of kernels share nothing, and are handed out one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            parts = nodeid.partition("::")[0].split("/")
            folder = parts[1] if len(parts) > 2 else ""
            return nodeid if folder == "kernels" else folder if folder in ("server", "remote") else "/".join(parts)

        def _assign_work_unit(self, node: Any) -> None:
            slowest = next((scope for scope in SLOWEST if scope in self.workqueue), None)
            if slowest is not None:
                self.workqueue.move_to_end(slowest, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log)
