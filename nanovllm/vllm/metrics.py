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
    """What only grows."""

    value: int


@dataclass
class Gauge(Metric):
    """What goes up and down."""

    value: float


@dataclass
class Vector(Metric):
    """Counters in a row; nano-vLLM has none, programs ask for the class."""

    values: list[int]


@dataclass
class Histogram(Metric):
    """Observations by upper bound; nano-vLLM has none: an output's `metrics` has the times of its request."""

    count: int
    sum: float
    buckets: dict[str, int]


def metrics_of(stats: "StepStats", model: str) -> list[Metric]:
    """Counters since the engine started, in tokens where vLLM counts tokens, and gauges of this moment."""
    metrics: list[Metric] = [
        Gauge("vllm:num_requests_running", stats.num_running),
        Gauge("vllm:num_requests_waiting", stats.num_waiting),
        Gauge("vllm:kv_cache_usage_perc", stats.cache_usage),
        Counter("vllm:prefix_cache_queries", stats.prefix_queries),
        Counter("vllm:prefix_cache_hits", stats.prefix_hits),
        Counter("vllm:num_preemptions", stats.num_preemptions),
        # Computed, or found in the cache; of a request that was preempted, both times.
        Counter("vllm:prompt_tokens", stats.num_prefill_tokens + stats.prefix_hits),
        Counter("vllm:generation_tokens", stats.num_output_tokens),
    ]
    for metric in metrics:
        metric.labels |= {"model_name": model, "engine": "0"}
    return metrics
