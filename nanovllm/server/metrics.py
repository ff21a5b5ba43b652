"""Counters and times for Prometheus, under vLLM's names where it has one, so that dashboards for vLLM work.

The engine's counters are read when Prometheus asks; a request costs a few observations at its end, a token one.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanovllm.async_llm import AsyncLLM
from nanovllm.outputs import RequestOutput

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
# Name -> (help, field of StepStats).
_GAUGES = {
    "num_requests_running": ("Completions that run.", "num_running"),
    "num_requests_waiting": ("Completions that wait.", "num_waiting"),
    "kv_cache_usage_perc": ("The share of the KV cache that is in use, from 0 to 1.", "cache_usage"),
}
_COUNTERS = {
    "num_preemptions": ("Preemptions.", "num_preemptions"),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_hits"),
    "engine_steps": ("Steps of the engine.", "num_steps"),
}


class Metrics:
    """One a server, with its own registry."""

    def __init__(self, llm: AsyncLLM, model_name: str, engine_index: int = 0) -> None:
        self._llm = llm
        self._labels = {"model_name": model_name, "engine": str(engine_index)}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._next_token = self._histogram("inter_token_latency_seconds", "From token to token.", _TOKEN_SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to end.", _REQUEST_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST_SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        lag = Histogram("nanovllm:event_loop_lag_seconds", "How late timers are.", ["engine"], registry=self.registry)
        self.see_loop_lag = lag.labels(str(engine_index)).observe
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*self._labels, "finished_reason"], registry=self.registry
        )

    def collect(self) -> Iterator[Metric]:
        """The engine's own counters; `prometheus_client` calls this."""
        stats = self._llm.stats()
        for family, found in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, field) in found.items():
                metric = family(f"vllm:{name}", text, labels=list(self._labels))
                metric.add_metric(list(self._labels.values()), getattr(stats, field))
                yield metric

    def describe(self) -> list[Metric]:
        """Names are not checked beforehand: that would ask an engine that may have ended."""
        return []

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self) -> "RequestWatch":
        return RequestWatch(self)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, list(self._labels), registry=self.registry, buckets=buckets)
        return metric.labels(**self._labels)


class RequestWatch:
    """Measures one request, from its outputs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._output: RequestOutput | None = None
        self._last = 0.0

    def see(self, output: RequestOutput) -> None:
        """An output has come."""
        now = time.perf_counter()
        if self._output is not None:
            self._metrics._next_token.observe(now - self._last)
        self._output, self._last = output, now

    def end(self) -> None:
        """No more come: the request has ended, or its client has left."""
        output, metrics = self._output, self._metrics
        if output is None or output.metrics is None:
            return
        times = output.metrics
        metrics._prompt_tokens.inc(len(output.prompt_token_ids))
        metrics._generation_tokens.inc(times.num_generation_tokens)
        metrics._prompt.observe(len(output.prompt_token_ids))
        metrics._generation.observe(times.num_generation_tokens)
        if times.first_token_latency is not None:
            metrics._first_token.observe(times.first_token_latency)
        if times.time_in_queue is not None:
            metrics._queue.observe(times.time_in_queue)
        if times.finished_time is not None:
            metrics._whole.observe(times.finished_time - times.arrival_time)
        reasons = {completion.finish_reason for completion in output.outputs} if output.finished else {"abort"}
        for reason in reasons:
            metrics._success.labels(**metrics._labels, finished_reason=reason or "abort").inc()
