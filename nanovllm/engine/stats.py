"""What an engine counts: plain numbers for a progress bar, metrics and tests."""

from dataclasses import dataclass, replace

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.step_plan import StepPlan


@dataclass(slots=True)
class StepStats:
    """Counters since the engine started, then the state of its cache and its queue."""

    num_steps: int = 0
    num_prefill_tokens: int = 0  # computed, not found in the prefix cache
    num_decode_tokens: int = 0
    num_output_tokens: int = 0  # that reached their sequences
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    evictions: int = 0
    cache_usage: float = 0.0
    num_running: int = 0
    num_waiting: int = 0

    def count(self, plan: StepPlan) -> None:
        """Count a step that was launched."""
        self.num_steps += 1
        self.num_decode_tokens += plan.num_decodes
        self.num_prefill_tokens += plan.num_tokens - plan.num_decodes


def snapshot(counters: StepStats, block_manager: BlockManager, scheduler: Scheduler, num_unfinished: int) -> StepStats:
    """The engine's own counters, completed by those of its cache and its scheduler."""
    cache = block_manager.stats
    return replace(
        counters,
        num_preemptions=scheduler.num_preemptions,
        prefix_queries=cache.prefix_queries,
        prefix_hits=cache.prefix_hits,
        evictions=cache.evictions,
        cache_usage=block_manager.usage,
        num_running=len(scheduler.running),
        num_waiting=num_unfinished - len(scheduler.running),
    )
