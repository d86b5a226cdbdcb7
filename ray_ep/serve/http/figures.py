"""Figures of serving for Prometheus, by the names of OpenTelemetry's conventions for generative AI (v1.38)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ray_ep.rank.generate.requests import Limits, RankStatus

_FIRST_S = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_TOKEN_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_REQUEST_S = [0.01 * 2**i for i in range(14)]
_TOKENS = [4**i for i in range(14)]  # buckets, as the conventions have them


class Figures:
    """Counts and times of one server, in a registry of its own.

    Args:
        model: its name. limits: the engine's. ranks: as they are. places: (taken, in all) of answers under way.
    """

    def __init__(
        self,
        model: str,
        limits: Limits,
        ranks: Callable[[], list[RankStatus]],
        places: Callable[[], tuple[int, int]],
    ):
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from prometheus_client import CollectorRegistry

        self._model, self._limits, self._ranks, self._places = model, limits, ranks, places
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._registry)
        self._provider = MeterProvider([reader], shutdown_on_exit=False)
        meter = self._provider.get_meter("ray_ep.serve")

        def histogram(name: str, unit: str, text: str, edges: list[Any]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=edges)

        self._first = histogram("gen_ai.server.time_to_first_token", "s", "Until the first token.", _FIRST_S)
        self._each = histogram("gen_ai.server.time_per_output_token", "s", "Of each token after it.", _TOKEN_S)
        self._request = histogram("gen_ai.server.request.duration", "s", "Of a whole request.", _REQUEST_S)
        self._tokens = histogram("gen_ai.client.token.usage", "{token}", "Tokens of a request.", _TOKENS)
        for name, text, value in (
            ("ep.serve.rank.requests", "Open requests of a rank, those that wait included.", self._open_requests),
            ("ep.serve.rank.outstanding_tokens", "Tokens that a rank still has to read or give.", self._outstanding),
            ("ep.serve.rank.cache_utilization", "Share of a rank's cache that is in use, 0 to 1.", self._cache_use),
            ("ep.serve.answers", "Answers under way.", self._under_way),
            ("ep.serve.answers_limit", "Answers that may be under way at once.", self._at_most),
        ):
            meter.create_observable_gauge(name, [_observing(value)], description=text)

    def answered(self, operation: str, first_s: float, rest_s: float, tokens: int) -> None:
        """An answer is whole: seconds until its first token and from there to its last one, and how many they were."""
        about = self._about(operation)
        self._first.record(first_s, about)
        if tokens > 1:
            self._each.record(rest_s / (tokens - 1), about)
        self._tokens.record(tokens, about | {"gen_ai.token.type": "output"})

    def ended(self, operation: str, seconds: float, prompt: int, error: str) -> None:
        """A request is over; `error`: the kind of its failure, "": none."""
        about = self._about(operation)
        self._request.record(seconds, about | ({"error.type": error} if error else {}))
        if not error:
            self._tokens.record(prompt, about | {"gen_ai.token.type": "input"})

    def text(self) -> bytes:
        """What Prometheus is told."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def _about(self, operation: str) -> dict[str, str]:
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ray_ep",
            "gen_ai.request.model": self._model,
        }

    def _of_ranks(self, value: Callable[[RankStatus], float]) -> Iterable[tuple[float, dict[str, str]]]:
        return [(value(rank), {"rank": str(rank.rank)}) for rank in self._ranks()]

    def _open_requests(self) -> Iterable[tuple[float, dict[str, str]]]:
        return self._of_ranks(lambda rank: rank.requests)

    def _outstanding(self) -> Iterable[tuple[float, dict[str, str]]]:
        return self._of_ranks(lambda rank: rank.outstanding_tokens)

    def _cache_use(self) -> Iterable[tuple[float, dict[str, str]]]:
        return self._of_ranks(lambda rank: rank.cached_tokens / self._limits.cache_tokens)

    def _under_way(self) -> Iterable[tuple[float, dict[str, str]]]:
        return [(self._places()[0], {})]

    def _at_most(self) -> Iterable[tuple[float, dict[str, str]]]:
        return [(self._places()[1], {})]


def _observing(value: Callable[[], Iterable[tuple[float, dict[str, str]]]]) -> Any:
    from opentelemetry.metrics import Observation

    return lambda _options: [Observation(number, labels) for number, labels in value()]
