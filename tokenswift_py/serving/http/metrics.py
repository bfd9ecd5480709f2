"""The metrics at /metrics, under vLLM's names. Counts and gauges are the engine's. Times are taken here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# the reason for each ending; any other ending is abort
REASONS = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length"}
GAUGES = {
    "num_requests_running": ("running", "Texts that are being written."),
    "num_requests_waiting": ("waiting", "Texts that wait for their turn."),
    "kv_cache_usage_perc": ("kv_usage", "The part of the KV cache's pages that is in use; 1 is all."),
}
COUNTERS = {
    "num_preemptions": ("preemptions", "Times that a text had to give its pages back, to go on later."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generated_tokens", "Tokens that were written."),
    "spec_decode_num_drafts": ("drafts", "Trees of drafts that were verified."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Draft tokens that were verified."),
    "spec_decode_num_accepted_tokens": ("accepted_draft_tokens", "Of these, those that were accepted."),
}
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class EngineFigures(Collector):
    """The engine's figures. They are read at every scrape."""

    def __init__(self, model: str, figures: Callable[[], Mapping[str, Any]]):
        self._model, self._figures = model, figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        for name, (key, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], figures[key])
            yield gauge
        for name, (key, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], figures[key])
            yield counter
        reasons = Counter(dict.fromkeys(("stop", "length", "abort"), 0.0))
        for ending, count in figures["finished"].items():
            reasons[REASONS.get(ending, "abort")] += count
        labels = ["model_name", "finished_reason"]
        done = CounterMetricFamily("vllm:request_success", "Texts by their end.", labels=labels)
        for reason, count in reasons.items():
            done.add_metric([self._model, reason], count)
        yield done


class Metrics:
    """The metrics of one server.

    figures: the function `Engine.figures`.
    """

    def __init__(self, model: str, figures: Callable[[], Mapping[str, Any]]):
        self._registry = CollectorRegistry()
        self._registry.register(EngineFigures(model, figures))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}_seconds", text, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(model_name=model)

        self._first = histogram("time_to_first_token", "Seconds from a request to the first token of a text.", FIRST)
        self._next = histogram("inter_token_latency", "Seconds a token; those of one pass share its time.", NEXT)
        self._whole = histogram("e2e_request_latency", "Seconds from a request to the end of a text.", WHOLE)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def more_tokens(self, seconds: float, tokens: int) -> None:
        """Counts tokens that came together, this many seconds after those before."""
        for _ in range(tokens):
            self._next.observe(seconds / tokens)

    def ended(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' format."""
        return generate_latest(self._registry)
