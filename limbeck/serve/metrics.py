"""Counters for Prometheus, under vLLM's names where it has one, so that its dashboards show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    30.0,
    60.0,
    120.0,
)
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)

Gauges = Callable[[], dict[str, float | list[float]]]
"""A list is a series by position."""


class Metrics:
    """One registry a server."""

    def __init__(self, model: str, now: Gauges, totals: Gauges) -> None:
        """Set up.

        Args:
          model: label of every series.
          now: values of gauges at the time of asking; totals: of counters that the engine keeps itself.
        """
        self._registry = CollectorRegistry()
        self._label = model
        self._registry.register(_Engine(model, now, totals))
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, and of prefixes and items.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens of texts.")
        self.scored_items = self._counter("limbeck:scored_items", "Items scored.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.")
        self.between_tokens = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.")
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end of a request.")
        self.queued = self._histogram("vllm:request_queue_time_seconds", "From arrival to the engine.")
        self.label_mass = self._histogram(
            "limbeck:label_mass", "Probability that an item is followed by a label, where that was computed.", SHARES
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended well.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            "limbeck:request_refused",
            "Requests that did not, by status.",
            ["model_name", "status"],
            registry=self._registry,
        )

    def succeeded(self, reason: str) -> None:
        """Count a request: stop, length, score, prefill."""
        self._success.labels(self._label, reason).inc()

    def refused(self, status: int) -> None:
        """Count an error; 499 for a client that went away."""
        self._refused.labels(self._label, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Any:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._label)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Any:
        return Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets).labels(self._label)


class _Engine:
    """Reads the engine's own numbers when somebody asks."""

    def __init__(self, model: str, now: Gauges, totals: Gauges) -> None:
        self._model, self._now, self._totals = model, now, totals

    def collect(self) -> Iterator[Any]:
        for kind, values in ((GaugeMetricFamily, self._now()), (CounterMetricFamily, self._totals())):
            for name, value in values.items():
                if isinstance(value, list):
                    family = kind(name, "Of the engine.", labels=["model_name", "position"])
                    for position, one in enumerate(value):
                        family.add_metric([self._model, str(position)], one)
                else:
                    family = kind(name, "Of the engine.", labels=["model_name"])
                    family.add_metric([self._model], value)
                yield family
