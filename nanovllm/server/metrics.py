"""Counters and times for Prometheus, under vLLM's names where it has one, so that dashboards for vLLM work.

The engine's counters are read when Prometheus asks; a request costs a few observations at its end, a token one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanovllm.outputs import RequestOutput
from nanovllm.remote.engines import Engines

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
_LABELS = ["model_name", "engine"]
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
    """One a server, with its own registry. What is of one engine has the label `engine`, its index."""

    def __init__(self, engines: Engines, model_name: str) -> None:
        self._engines, self._model_name = engines, model_name
        self._watched: dict[int, _Watched] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._families = {
            "prompt_tokens": self._counter("prompt_tokens", "Tokens of prompts."),
            "generation_tokens": self._counter("generation_tokens", "Generated tokens."),
            "first_token": self._times("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS),
            "next_token": self._times("inter_token_latency_seconds", "From token to token.", _TOKEN_SECONDS),
            "whole": self._times("e2e_request_latency_seconds", "From arrival to end.", _REQUEST_SECONDS),
            "queue": self._times("request_queue_time_seconds", "From arrival to the first step.", _REQUEST_SECONDS),
            "prompt": self._times("request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
            "generation": self._times("request_generation_tokens", "Generated tokens of a request.", _TOKENS),
        }
        self._success = self._counter("request_success", "Requests that ended.", "finished_reason")
        lag = Histogram("nanovllm:event_loop_lag_seconds", "How late timers are.", registry=self.registry)
        self.see_loop_lag = lag.observe
        for engine in engines.all:
            self.watch(engine.index)  # so that its counters are there, with 0

    def collect(self) -> Iterator[Metric]:
        """The engines' own counters; `prometheus_client` calls this."""
        for family, found in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, field) in found.items():
                metric = family(f"vllm:{name}", text, labels=_LABELS)
                for engine in self._engines.all:
                    metric.add_metric(self._labels(engine.index), getattr(engine.stats, field))
                yield metric
        serves = GaugeMetricFamily("nanovllm:engine_up", "Whether the engine serves.", labels=_LABELS)
        restarts = CounterMetricFamily("nanovllm:engine_restarts", "How often it was started again.", labels=_LABELS)
        for engine in self._engines.all:
            serves.add_metric(self._labels(engine.index), engine.facts is not None)
            restarts.add_metric(self._labels(engine.index), engine.num_restarts)
        yield from (serves, restarts)

    def describe(self) -> list[Metric]:
        """Names are not checked beforehand."""
        return []

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self, engine_index: int) -> "RequestWatch":
        """Measures a request that this engine runs."""
        watched = self._watched.get(engine_index)
        if watched is None:
            labels = self._labels(engine_index)
            of_engine = {name: family.labels(*labels) for name, family in self._families.items()}
            ended = partial(self._success.labels, *labels)
            watched = self._watched[engine_index] = _Watched(**of_engine, ended=ended)
        return RequestWatch(watched)

    def _labels(self, engine_index: int) -> list[str]:
        return [self._model_name, str(engine_index)]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*_LABELS, *labels], registry=self.registry)

    def _times(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _LABELS, registry=self.registry, buckets=buckets)


@dataclass(slots=True)
class _Watched:
    """What is measured of an engine's requests. `ended` gives the counter of a reason."""

    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Histogram
    next_token: Histogram
    whole: Histogram
    queue: Histogram
    prompt: Histogram
    generation: Histogram
    ended: Callable[[str], Counter]


class RequestWatch:
    """Measures one request, from its outputs."""

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        self._output: RequestOutput | None = None
        self._last = 0.0

    def see(self, output: RequestOutput) -> None:
        """An output has come."""
        now = time.perf_counter()
        if self._output is not None:
            self._watched.next_token.observe(now - self._last)
        self._output, self._last = output, now

    def end(self) -> None:
        """No more come: the request has ended, or its client has left."""
        output, to = self._output, self._watched
        if output is None or output.metrics is None:
            return
        times = output.metrics
        to.prompt_tokens.inc(len(output.prompt_token_ids))
        to.generation_tokens.inc(times.num_generation_tokens)
        to.prompt.observe(len(output.prompt_token_ids))
        to.generation.observe(times.num_generation_tokens)
        if times.first_token_latency is not None:
            to.first_token.observe(times.first_token_latency)
        if times.time_in_queue is not None:
            to.queue.observe(times.time_in_queue)
        if times.finished_time is not None:
            to.whole.observe(times.finished_time - times.arrival_time)
        reasons = {completion.finish_reason for completion in output.outputs} if output.finished else {"abort"}
        for reason in reasons:
            to.ended(reason or "abort").inc()
