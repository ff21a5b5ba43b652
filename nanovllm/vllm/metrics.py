"""The engine's counters as vLLM's metrics: `LLM.get_metrics()`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.stats import StepStats


@dataclass
class Metric:
    name: str
    labels: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass
class Vector(Metric):
    """A list of counters. nano-vLLM has none; the class is here for programs that import it."""

    values: list[int]


@dataclass
class Histogram(Metric):
    """Counts of observations by upper bound. nano-vLLM has none; an output's `metrics` has the times of its request."""

    count: int
    sum: float
    buckets: dict[str, int]


def metrics_of(stats: "StepStats", model: str) -> list[Metric]:
    """The counters since the engine started and the gauges of this moment, in vLLM's units (tokens, not blocks)."""
    metrics: list[Metric] = [
        Gauge("vllm:num_requests_running", stats.num_running),
        Gauge("vllm:num_requests_waiting", stats.num_waiting),
        Gauge("vllm:kv_cache_usage_perc", stats.cache_usage),
        Counter("vllm:prefix_cache_queries", stats.prefix_queries),
        Counter("vllm:prefix_cache_hits", stats.prefix_hits),
        Counter("vllm:num_preemptions", stats.num_preemptions),
        # Tokens computed or found in the cache. After a preemption, a prompt counts again.
        Counter("vllm:prompt_tokens", stats.num_prefill_tokens + stats.prefix_hits),
        Counter("vllm:generation_tokens", stats.num_output_tokens),
    ]
    for metric in metrics:
        metric.labels |= {"model_name": model, "engine": "0"}
    return metrics
