"""A trace of the real scheduler and block manager, without a model: made in a moment, always the same."""

import inspect
import random
from collections.abc import Iterator
from typing import Any

from nanovllm.cache_groups import Windows
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.cache_changes import DigestChanges, SeenTables, table_changes
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE, BUDGET = 16, 64
WORDS = ["def ", "mean", "(", "values", "):", "\n    ", "return ", "sum", "[0]", " # 你好 "]
FUNCTIONS = {
    "Scheduler.add": Scheduler.add,
    "Scheduler.finish": Scheduler.finish,
    "Scheduler._admit_waiting": vars(Scheduler)["_admit_waiting"],
    "Scheduler._preempt_latest": vars(Scheduler)["_preempt_latest"],
    "BlockManager.find_prefix": BlockManager.find_prefix,
    "BlockManager._take": vars(BlockManager)["_take"],
}


def head(num_blocks: int = 40, **more: Any) -> dict[str, Any]:
    functions = {
        name: {
            "file": "engine/" + ("scheduler.py" if name.startswith("Scheduler") else "block_manager.py"),
            "line": inspect.getsourcelines(function)[1],
            "source": inspect.getsource(function),
        }
        for name, function in FUNCTIONS.items()
    }
    return {
        "kind": "head",
        "format": "nano-vllm-trace-2",
        "model": "demo",
        "device": "cpu",
        "num_blocks": num_blocks,
        "block_size": BLOCK_SIZE,
        "windows": [None],
        "max_num_seqs": 16,
        "max_num_batched_tokens": BUDGET,
        "restarts": 0,
        "started": 1790000000.0,
        "hidden_size": 256,
        "num_layers": 8,
        "num_kv_heads": 4,
        "functions": functions,
        **more,
    }


def event(what: str, request: str | None, by: str, en: str, zh: str, **data: Any) -> dict[str, Any]:
    return {"what": what, "request": request, "by": by, "text": {"en": en, "zh": zh}, "data": data}


class Engine:
    """Steps a scheduler whose sequences draw random tokens, and tells each step as a trace does."""

    def __init__(self, num_blocks: int = 40, seed: int = 0, windows: Windows = (None,)) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, windows=windows)
        self.scheduler = Scheduler(self.manager, 16, BUDGET)
        self.random = random.Random(seed)
        self.names: dict[Sequence, str] = {}
        self.alive: list[Sequence] = []
        self.events: list[dict[str, Any]] = []
        self.digests = DigestChanges()
        self.seen: dict[Sequence, SeenTables] = {}
        self.n = self.output_tokens = 0

    def add(self, num_tokens: int, max_tokens: int, prefix: int = 0, prompt: str = "def mean(values):") -> dict:
        """A request whose first `prefix` tokens are every other request's. Returns its object for the trace."""
        tokens = [7] * prefix + [self.random.randrange(1000) for _ in range(num_tokens - prefix)]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        seq = Sequence("", tokens, params, num_tokens + max_tokens, frozenset(), {}, 0)
        index = len(self.names)
        name = self.names[seq] = chr(65 + index % 26) + (str(index // 26) if index >= 26 else "")
        self.seen[seq] = SeenTables(name)
        self.alive.append(seq)
        self.scheduler.add(seq)
        self.events.append(event("arrive", name, "Scheduler.add", f"{name} arrives.", f"{name} 到达。"))
        return {
            "kind": "request",
            "request": name,
            "prompt_tokens": num_tokens,
            "prompt": prompt,
            "max_tokens": max_tokens,
        }

    def step(self, full: bool = False) -> dict[str, Any]:
        scheduler, manager, names = self.scheduler, self.manager, self.names
        waiting_before, evictions = list(scheduler.waiting), manager.stats.evictions
        before = list(scheduler.running)
        plan = scheduler.schedule()
        for seq in before:
            if seq not in scheduler.running:
                text = f"{names[seq]} is preempted.", f"{names[seq]} 被抢占。"
                self.events.append(event("preempt", names[seq], "Scheduler._preempt_latest", *text, blocks=[]))
        for seq in waiting_before:
            if seq in scheduler.running:
                self.tell_admission(seq)
        if manager.stats.evictions > evictions:
            self.events.append(
                event("evict", None, "BlockManager._take", "A block is evicted.", "一个块被驱逐。", block=0)
            )
        self.n += 1
        step = self.as_object(plan, full)
        step["tokens"] = {names[seq]: [self.random.choice(WORDS)] for seq in plan.samples}
        for seq in plan.samples:
            seq.append_token(self.random.randrange(1000))
            self.output_tokens += 1
            if seq.is_finished:
                scheduler.finish(seq)
                self.alive.remove(seq)
                name = names[seq]
                self.events.append(event("finish", name, "Scheduler.finish", f"{name} ends.", f"{name} 完成。"))
        return step

    def tell_admission(self, seq: Sequence) -> None:
        name = self.names[seq]
        by = "Scheduler._admit_waiting"
        self.events.append(event("admit", name, by, f"{name} enters.", f"接纳 {name}。", blocks=seq.block_tables[0]))
        if seq.num_cached_tokens:
            n = seq.num_cached_tokens
            text = f"{name} finds {n} tokens.", f"{name} 前缀命中 {n} 个词元。"
            self.events.append(event("hit", name, "BlockManager.find_prefix", *text, tokens=n, blocks=[]))

    def as_object(self, plan: ScheduledStep, full: bool) -> dict[str, Any]:
        """The step just scheduled, with the blocks that changed since the last one."""
        scheduler, manager = self.scheduler, self.manager
        rows = {seq.row: seq for seq in scheduler.running}
        batch = []
        for row, count in zip(plan.plan.rows, plan.plan.query_lens, strict=True):
            seq, kind = rows[row], "decode" if len(batch) < plan.plan.num_decodes else "prefill"
            batch.append([self.names[seq], kind, seq.num_computed_tokens - count, count])
        running = [(self.seen[seq], seq.block_tables) for seq in scheduler.running]
        tables = table_changes(running, manager.windows)
        digests = {block: digest[:4].hex() if digest else "" for block, digest in self.digests.take(manager).items()}
        events, self.events = self.events, []
        stats = manager.stats
        return {
            "kind": "step",
            "n": self.n,
            "t": self.n * 0.01,
            "ms": 9.5,
            "batch": batch,
            "running": [self.names[seq] for seq in scheduler.running],
            "waiting": [self.names[seq] for seq in scheduler.waiting],
            "tables": tables,
            "digests": [list(digests), list(digests.values())],
            "events": events,
            "stats": {
                "usage": manager.usage,
                "hit_rate": stats.prefix_hits / max(1, stats.prefix_queries),
                "queries": stats.prefix_queries,
                "hits": stats.prefix_hits,
                "preemptions": scheduler.num_preemptions,
                "evictions": stats.evictions,
                "steps": self.n,
                "output_tokens": self.output_tokens,
                "tok_s": 100.0 * len(plan.samples),
            },
            **({"full": True} if full else {}),
        }


def sample_trace(num_blocks: int = 40) -> Iterator[dict[str, Any]]:
    """Ten requests with one beginning, too many for the cache, then one long prompt among short ones."""
    engine = Engine(num_blocks)
    yield head(num_blocks)
    for _ in range(10):
        yield engine.add(60, 40, prefix=48)
    while engine.alive:
        yield engine.step(full=engine.n == 0)
    yield engine.add(20, 30)
    yield engine.step()
    yield engine.add(200, 12)
    while engine.alive:
        yield engine.step()
    yield engine.step()  # the last blocks go back


def window_trace() -> Iterator[dict[str, Any]]:
    """Three requests of a model with one group of layers that sees all and two with a window of 48 tokens."""
    windows = (None, 48, 48)
    engine = Engine(80, windows=windows)
    yield head(80, windows=windows)
    for _ in range(3):
        yield engine.add(100, 60, prefix=32)
    while engine.alive:
        yield engine.step(full=engine.n == 0)
