"""Step traces become the JSON objects of a trace: a head, then requests, gaps and steps.

A reader knows what every block holds if it applies all steps in order. A step has, for each block table that has
changed, `[request, group of layers, kept, given back, added]`: how many of its entries stay, how many at the beginning
are gone (-1), and the blocks behind those kept. Of digests that have changed it has the blocks and beside them 8 hex
digits, or "" for a block that lost its own. With `"full": true` these are all there are, and the reader forgets what it
knew; the tables of requests that do not run any more are gone in any case. A block in a table is used, another one
with a digest is cached, and the rest are free. A gap says how many steps are missing; `n` counts them.
"""

import time
from collections import deque
from typing import Any

from nanovllm.engine.step_trace import EngineShape, StepTrace
from nanovllm.trace.functions import functions
from nanovllm.trace.words import words

FORMAT = "nano-vllm-trace-2"
Object = dict[str, Any]


def head(shape: EngineShape, model: str, num_engines: int = 1, num_restarts: int = 0) -> Object:
    """The first object: what the engine is, and the source of every function that an event names.

    Args:
        num_engines: of a server; the trace is of the first. num_restarts: of that one.
    """
    about = {"kind": "head", "format": FORMAT, "model": model, "engines": num_engines, "restarts": num_restarts}
    return about | {"started": time.time()} | shape._asdict() | {"functions": functions()}


class TraceWriter:
    """Makes the objects of one trace, in order, and remembers what a reader knows who has read all of it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._requests: dict[str, Object] = {}  # of those that have not ended
        self._tables: dict[tuple[str, int], list[int]] = {}  # by request and group
        self._digests: dict[int, str] = {}
        self._last: Object | None = None
        self._n = 0
        self._tokens: deque[tuple[float, int]] = deque()  # (time, output tokens), over the last second

    def objects(self, trace: StepTrace) -> list[Object]:
        """What a reader gets who has all before: a gap if there is one, new requests, the step."""
        made: list[Object] = []
        if trace.num_skipped:
            made.append({"kind": "gap", "steps": trace.num_skipped})
        self._n += trace.num_skipped + 1
        if trace.is_full:
            self._tables.clear()
            self._digests.clear()
            self._requests.clear()
        for name, num_prompt_tokens, prompt, max_tokens in trace.arrivals:
            self._requests[name] = {
                "kind": "request",
                "request": name,
                "prompt_tokens": num_prompt_tokens,
                "prompt": prompt,
                "max_tokens": max_tokens,
            }
            made.append(self._requests[name])
        self._follow_tables(trace)
        digests = {block: digest[:4].hex() if digest else "" for block, digest in trace.digests.items()}
        self._digests |= digests
        for event in trace.events:
            if event.what in ("finish", "abort"):
                self._requests.pop(event.name, None)
        self._last = {
            "kind": "step",
            "n": self._n,
            "t": round(trace.time_s - self._began, 6),
            "ms": round(1000 * trace.step_s, 3),
            "batch": trace.batch,
            "running": trace.running,
            "waiting": trace.waiting,
            "tables": trace.tables,
            "digests": [list(digests), list(digests.values())],
            "events": [
                {"what": event.what, "request": event.name, "by": event.by, "text": words(event), "data": event.data}
                for event in trace.events
            ],
            "tokens": trace.pieces,
            "stats": self._stats(trace),
        }
        if trace.is_full:
            self._last["full"] = True
        return [*made, self._last]

    def full(self, num_missed: int = 0) -> list[Object]:
        """What a reader gets who has read nothing, or has missed the last `num_missed` steps."""
        if self._last is None:
            return []
        made: list[Object] = [{"kind": "gap", "steps": num_missed}] if num_missed else []
        tables = [(*of, 0, 0, table) for of, table in self._tables.items()]
        digests = {block: digest for block, digest in self._digests.items() if digest}
        now = {"tables": tables, "digests": [list(digests), list(digests.values())], "events": [], "tokens": {}}
        return [*made, *self._requests.values(), self._last | now | {"full": True}]

    def _follow_tables(self, trace: StepTrace) -> None:
        running = set(trace.running)
        for of in [of for of in self._tables if of[0] not in running]:
            del self._tables[of]
        for name, group, num_kept, num_given_back, added in trace.tables:
            table = self._tables.setdefault((name, group), [])
            table[num_kept:] = added
            table[:num_given_back] = [-1] * num_given_back

    @property
    def n(self) -> int:
        """The number of the last step."""
        return self._n

    def _stats(self, trace: StepTrace) -> Object:
        stats, tokens = trace.stats, self._tokens
        tokens.append((trace.time_s, stats.num_output_tokens))
        while len(tokens) > 2 and tokens[1][0] < trace.time_s - 1:
            tokens.popleft()
        seconds, made = (now - then for now, then in zip(tokens[-1], tokens[0], strict=True))
        return {
            "usage": round(stats.cache_usage, 4),
            "hit_rate": round(stats.prefix_hits / stats.prefix_queries, 4) if stats.prefix_queries else 0.0,
            "queries": stats.prefix_queries,
            "hits": stats.prefix_hits,
            "preemptions": stats.num_preemptions,
            "evictions": stats.evictions,
            "steps": stats.num_steps,
            "output_tokens": stats.num_output_tokens,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "tok_s": round(made / seconds, 1) if seconds > 0 else 0.0,
        }
